"""Adapters that come from clients and go to them as files: what is refused, and that nothing stays behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import time

import grpc
import pytest
from server.conftest import furnish
from server.harness import Live, refused

from onebase.server.config import EngineConfig, Limits, ServerConfig
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import AdapterKind, DeleteAdapterJob, LoadAdapterJob, Pooling, SaveAdapterJob
from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2, types_pb2

A = adapters_pb2
POLICY, REWARD = types_pb2.ADAPTER_KIND_POLICY, types_pb2.ADAPTER_KIND_REWARD
CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 8
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
TOTAL = sum(map(len, FILES.values()))


@pytest.fixture
def spool(tmp_path, monkeypatch):
    """The temporary directory, which nobody else uses."""
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    return tmp_path / "spool"


def kept(spool):
    """The directories of the uploads and downloads under way."""
    return list(spool.glob("onebase-*/*/*"))


@pytest.fixture
def live(spool):
    config = ServerConfig(
        engine=EngineConfig(model="fake"), port=0, drain_seconds=5, limits=Limits(max_upload_bytes=TOTAL)
    )
    with Live(config) as server:
        furnish(server)
        yield server


def described(name, data):
    return A.AdapterFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def header(name="two", session="", files=None, **more):
    listed = [described(*item) for item in FILES.items()] if files is None else files
    return A.UploadAdapterHeader(**{"name": name, "session_id": session, "kind": POLICY, "files": listed, **more})


def upload(head, data=CONFIG + WEIGHTS, size=1000):
    """The messages of an upload; its bytes in pieces that end anywhere."""
    yield A.UploadAdapterRequest(header=head)
    for start in range(0, len(data), size):
        yield A.UploadAdapterRequest(data=data[start : start + size])


def wait_empty(spool):
    until = time.monotonic() + 10
    while kept(spool):
        assert time.monotonic() < until, list(spool.rglob("*"))
        time.sleep(0.005)


def loads(live):
    return [job for job in live.worker.submitted if isinstance(job, LoadAdapterJob) and job.path is not None]


# ------------------------------------------------------------------------------------------------------- upload


@pytest.mark.parametrize("size", [1, 7, len(CONFIG), 1000, TOTAL])
def test_an_upload_is_loaded_from_its_files_and_leaves_none(live, session, spool, size):
    head = header(session=session, value_head=True, with_optimizer=True, seed=4)
    loaded = live.adapters.UploadAdapter(upload(head, size=size))
    assert (loaded.name, loaded.kind, loaded.version, loaded.source, loaded.leased) == (
        "two",
        POLICY,
        0,
        "uploaded",
        True,
    )
    (job,) = loads(live)
    assert (job.kind, job.value_head, job.with_optimizer, job.seed) == (AdapterKind.POLICY, True, True, 4)
    assert live.worker.read == FILES
    assert job.path.is_relative_to(spool)
    wait_empty(spool)


def test_its_directory_is_private(live, spool):
    modes = []
    live.worker.before = lambda job: modes.append(job.path.stat().st_mode & 0o777)
    live.adapters.UploadAdapter(upload(header()))
    assert modes == [0o700]


def test_an_upload_says_how_a_reward_reads(live):
    head = header(kind=REWARD, append_eos=False, pooling=types_pb2.POOLING_LAST_NOT_PAD)
    loaded = live.adapters.UploadAdapter(upload(head))
    (job,) = loads(live)
    assert (job.kind, job.append_eos, job.pooling) == (AdapterKind.REWARD, False, Pooling.LAST_NOT_PAD)
    assert not loaded.leased
    refusal = refused(live.adapters.UploadAdapter, upload(header("three", append_eos=False)))
    assert (refusal.reason, refusal.field) == ("UNUSED_FIELD", "append_eos")


def test_each_push_of_a_policy_is_its_next_version(live, session):
    training = training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1})
    pushed = [live.adapters.UploadAdapter(upload(header("p1", session, replace=True))) for _ in range(3)]
    assert [one.version for one in pushed] == [1, 2, 3]
    assert live.training.OptimStep(training).adapter.version == 4
    assert len(live.worker.wait_submitted(DeleteAdapterJob, 3)) == 3
    now = live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session))
    assert (now.ppo_adapter_name, list(now.leases)) == ("p1", ["p1"])


def test_only_the_lease_holder_replaces(live, session, spool):
    refusal = refused(live.adapters.UploadAdapter, upload(header("p1", replace=True)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "NOT_LEASE_HOLDER")
    assert refused(live.adapters.UploadAdapter, upload(header("p1", session))).reason == "ADAPTER_EXISTS"
    wait_empty(spool)


def test_a_repeated_upload_is_answered_and_not_loaded_again(live, session):
    head = header("p1", session, replace=True, request_id="once")
    first, second = (live.adapters.UploadAdapter(upload(head)) for _ in range(2))
    assert first == second
    assert len(loads(live)) == 1
    other = header("p1", session, replace=True, request_id="once", seed=9)
    assert refused(live.adapters.UploadAdapter, upload(other)).reason == "REQUEST_ID_REUSED"


def test_an_upload_that_waits_for_another_of_its_id_has_the_files_when_that_one_is_gone(live, spool):
    """The first call's client goes away; the load that it began is the second's too."""
    live.worker.hold(LoadAdapterJob)
    head = header(request_id="once")
    first = live.adapters.UploadAdapter.future(upload(head))
    live.worker.wait_submitted(LoadAdapterJob)
    second = live.adapters.UploadAdapter.future(upload(head))
    until = time.monotonic() + 10
    while len(kept(spool)) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.1)  # for the second's bytes
    first.cancel()
    time.sleep(0.1)
    live.worker.release()
    assert second.result(timeout=20).name == "two"
    assert live.worker.read == FILES
    assert len(loads(live)) == 1
    wait_empty(spool)


def test_what_reading_refuses_is_told_in_the_words_of_an_upload(live, spool):
    def refuse(job):
        raise FailedPrecondition(
            "WRONG_BASE", f"{job.path} was saved from another base, see {job.path}/x", field="path"
        )

    live.worker.before = refuse
    refusal = refused(live.adapters.UploadAdapter, upload(header()))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_BASE",
        "files",
    )
    assert refusal.message == "the upload was saved from another base, see x"
    wait_empty(spool)


# ----------------------------------------------------------------------------------------------------- refusals


def listed(name="adapter_model.safetensors", data=WEIGHTS, **changes):
    """The files of a header, the second of them changed."""
    second = described(name, data)
    for key, value in changes.items():
        setattr(second, key, value)
    return [described("adapter_config.json", CONFIG), second]


BAD_HEADERS = {
    "no name": (header(""), "BAD_ADAPTER_NAME", "name"),
    "no kind": (header(kind=types_pb2.ADAPTER_KIND_UNSPECIFIED), "REQUIRED", "kind"),
    "a reward with a value head": (header(kind=REWARD, value_head=True), "UNUSED_FIELD", "value_head"),
    "no files": (header(files=[]), "REQUIRED", "files"),
    "no weights": (header(files=listed()[:1]), "REQUIRED", "files"),
    "no config": (header(files=listed()[1:]), "REQUIRED", "files"),
    "a file twice": (header(files=[*listed(), listed()[0]]), "DUPLICATE_FILE", "files[2].name"),
    "a pickle": (header(files=listed("adapter_model.bin")), "PICKLE_ADAPTER", "files[1].name"),
    "a way out": (header(files=listed("../x")), "UNKNOWN_FILE", "files[1].name"),
    "an absolute way out": (header(files=listed("/etc/adapter_config.json")), "UNKNOWN_FILE", "files[1].name"),
    "a way round": (header(files=listed("./adapter_model.safetensors")), "UNKNOWN_FILE", "files[1].name"),
    "another file": (header(files=[*listed(), described("x.json", b"{}")]), "UNKNOWN_FILE", "files[2].name"),
    "an empty file": (header(files=listed(bytes=0)), "OUT_OF_RANGE", "files[1].bytes"),
    "less than nothing": (header(files=listed(bytes=-1)), "OUT_OF_RANGE", "files[1].bytes"),
    "no hash": (header(files=listed(sha256="")), "BAD_HASH", "files[1].sha256"),
    "a hash in capitals": (header(files=listed(sha256="A" * 64)), "BAD_HASH", "files[1].sha256"),
    "a byte too many": (header(files=listed(bytes=len(WEIGHTS) + 1)), "LIMIT_EXCEEDED", "files"),
    "no such session": (header(session="s" * 32), "SESSION_NOT_FOUND", ""),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_by_its_field_before_a_byte_is_kept(live, spool, case):
    head, reason, field = BAD_HEADERS[case]
    made = []
    original = tempfile.mkdtemp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", lambda *args, **more: made.append(args) or original(*args, **more))
        refusal = refused(live.adapters.UploadAdapter, upload(head))
    assert refusal.reason == reason
    if field:
        assert refusal.field == field
        assert field.split(".")[0] in refusal.message
    assert not made
    assert not loads(live)


FLIPPED = CONFIG + bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]
BAD_STREAMS = {
    "a bit flipped": (upload(header(), FLIPPED), "DATA_LOSS", "HASH_MISMATCH", "files[1].sha256"),
    "files in another order": (upload(header(), WEIGHTS + CONFIG), "DATA_LOSS", "HASH_MISMATCH", "files[0].sha256"),
    "too short": (upload(header(), (CONFIG + WEIGHTS)[:-1]), "INVALID_ARGUMENT", "TRUNCATED", "data"),
    "no data": (upload(header(), b""), "INVALID_ARGUMENT", "TRUNCATED", "data"),
    "too long": (upload(header(), CONFIG + WEIGHTS + b"!"), "INVALID_ARGUMENT", "TOO_MANY_BYTES", "data"),
    "nothing": ([], "INVALID_ARGUMENT", "REQUIRED", "header"),
    "data first": ([A.UploadAdapterRequest(data=b"x")], "INVALID_ARGUMENT", "REQUIRED", "header"),
    "an empty message first": ([A.UploadAdapterRequest()], "INVALID_ARGUMENT", "REQUIRED", "header"),
    "two headers": (
        [A.UploadAdapterRequest(header=header()), A.UploadAdapterRequest(header=header())],
        "INVALID_ARGUMENT",
        "SECOND_HEADER",
        "header",
    ),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_a_broken_stream_is_refused_and_leaves_nothing(live, spool, case):
    messages, code, reason, field = BAD_STREAMS[case]
    refusal = refused(live.adapters.UploadAdapter, iter(list(messages)))
    assert (refusal.code.name, refusal.reason, refusal.field) == (code, reason, field)
    assert not loads(live)
    wait_empty(spool)
    live.adapters.UploadAdapter(upload(header()))  # and the name was not taken


def test_bytes_that_are_no_message_are_refused(live, spool):
    call = live.channel.stream_unary("/onebase.v1.AdapterService/UploadAdapter")
    head = A.UploadAdapterRequest(header=header()).SerializeToString()
    for raws in ([b"\xff\xff"], [head, b"\xff\xff"]):
        refusal = refused(call, iter(raws))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    wait_empty(spool)


def test_a_full_disk_is_told(live, spool):
    shutil.rmtree(spool)
    spool.touch()
    refusal = refused(live.adapters.UploadAdapter, upload(header()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_SPACE")


def test_an_upload_cancelled_midway_leaves_nothing(live, spool):
    sent, stop = threading.Event(), threading.Event()

    def slowly():
        yield from list(upload(header(), size=500))[:3]
        sent.set()
        stop.wait(20)

    call = live.adapters.UploadAdapter.future(slowly())
    assert sent.wait(20)
    until = time.monotonic() + 10
    while not list(spool.rglob("adapter_model*")) and time.monotonic() < until:
        time.sleep(0.005)
    assert list(spool.rglob("adapter_model*"))
    call.cancel()
    stop.set()
    wait_empty(spool)
    assert not loads(live)
    live.adapters.UploadAdapter(upload(header()))


def test_an_upload_cancelled_while_it_is_loaded_leaves_nothing(live, spool):
    live.worker.hold(LoadAdapterJob)
    call = live.adapters.UploadAdapter.future(upload(header()))
    (job,) = live.worker.wait_submitted(LoadAdapterJob)
    call.cancel()
    live.worker.wait_done(job)
    live.worker.release()
    wait_empty(spool)
    live.adapters.UploadAdapter(upload(header()))


def test_a_slow_upload_keeps_nobody_waiting(live):
    begun, stop = threading.Event(), threading.Event()

    def slowly():
        yield from list(upload(header()))[:2]
        begun.set()
        stop.wait(20)
        yield from list(upload(header()))[2:]

    call = live.adapters.UploadAdapter.future(slowly())
    assert begun.wait(20)
    for name in ("a", "b"):
        live.adapters.UploadAdapter(upload(header(name)))
    assert not call.done()
    stop.set()
    assert call.result(timeout=20).name == "two"


# ----------------------------------------------------------------------------------------------------- download


def download(live, **more):
    first, *rest = live.adapters.DownloadAdapter(A.DownloadAdapterRequest(**{"name": "p1", **more}))
    return first.header, b"".join(one.data for one in rest), [len(one.data) for one in rest]


def test_a_download_is_what_a_save_writes_and_leaves_nothing(live, session, spool):
    large = bytes(3 * 2**20 + 5)
    live.worker.written = {**FILES, "onebase.json": json.dumps({}).encode(), "optimizer.safetensors": large}
    live.training.OptimStep(training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1}))
    head, data, sizes = download(live, with_optimizer=True)
    assert (head.adapter.name, head.adapter.version) == ("p1", 1)
    assert [one.name for one in head.files] == sorted(live.worker.written)
    assert max(sizes) == 2**20
    for one in head.files:
        part, data = data[: one.bytes], data[one.bytes :]
        assert part == live.worker.written[one.name]
        assert one.sha256 == hashlib.sha256(part).hexdigest()
    assert data == b""
    job = live.worker.executed[-1]
    assert isinstance(job, SaveAdapterJob)
    assert (job.with_optimizer, job.merged) == (True, False)
    wait_empty(spool)


def test_a_download_of_nothing_is_refused(live, spool):
    refusal = refused(live.adapters.DownloadAdapter, A.DownloadAdapterRequest(name="p9"))
    assert (refusal.code, refusal.reason, refusal.field) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", "name")
    live.worker.failures.append(FailedPrecondition("NOT_NOW", "not now"))
    assert refused(live.adapters.DownloadAdapter, A.DownloadAdapterRequest(name="p1")).reason == "NOT_NOW"
    wait_empty(spool)


def test_a_download_cancelled_midway_leaves_nothing(live, spool):
    live.worker.written = {"adapter_model.safetensors": bytes(64 * 2**20)}
    stream = live.adapters.DownloadAdapter(A.DownloadAdapterRequest(name="p1"))
    next(stream)
    assert kept(spool)
    stream.cancel()
    wait_empty(spool)


def test_a_download_cancelled_while_it_is_saved_leaves_nothing(live, spool):
    live.worker.hold(SaveAdapterJob)
    stream = live.adapters.DownloadAdapter(A.DownloadAdapterRequest(name="p1"))
    (job,) = live.worker.wait_submitted(SaveAdapterJob)
    stream.cancel()
    live.worker.wait_done(job)
    live.worker.release()
    wait_empty(spool)


# ------------------------------------------------------------------------------------------------------- merged


def test_a_merged_model_is_asked_for_without_moments(tmp_path):
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, roots=(tmp_path,))
    with Live(config) as live:
        furnish(live)
        request = A.SaveAdapterRequest(name="p1", path="m", merged=True)
        live.adapters.SaveAdapter(request)
        assert live.worker.executed[-1].merged
        request.with_optimizer = True
        refusal = refused(live.adapters.SaveAdapter, request)
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "UNUSED_FIELD",
            "with_optimizer",
        )


def test_an_earlier_merged_model_may_be_overwritten(tmp_path):
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, roots=(tmp_path,))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_bytes(b"...")
    with Live(config) as live:
        furnish(live)
        request = A.SaveAdapterRequest(name="p1", path="m", merged=True, overwrite=True)
        assert refused(live.adapters.SaveAdapter, request).reason == "NOT_AN_ADAPTER"
        (tmp_path / "m/onebase.json").write_text("{}")
        live.worker.failures.append(FailedPrecondition("REACHED", "the worker was asked"))
        assert refused(live.adapters.SaveAdapter, request).reason == "REACHED"
