"""Adapters' directories on the client's side: what is sent is what is there, what is written was checked."""

import hashlib
import json
import os

import grpc
import pytest
from client.services import EARLY
from client.wire import Failure, version

from onebase.client.errors import (
    AlreadyExistsError,
    DataLossError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from onebase.client.types import AdapterVersion
from onebase.v1 import adapters_pb2, types_pb2

LARGE = os.urandom(2 * 2**20 + 17)
UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "draining")


@pytest.fixture
def adapter(tmp_path):
    """A directory as PEFT writes it, with moments and a README."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (path / "adapter_model.safetensors").write_bytes(LARGE)
    (path / "optimizer.safetensors").write_bytes(b"moments")
    (path / "README.md").write_text("hello")
    return path


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def entry(name, data):
    return adapters_pb2.AdapterFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def messages(files, size=2**20, data=None):
    """A download of these files."""
    header = adapters_pb2.DownloadAdapterHeader(
        adapter=version("policy_1", 5), files=[entry(*item) for item in files.items()]
    )
    data = b"".join(files.values()) if data is None else data
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    return [
        adapters_pb2.DownloadAdapterResponse(header=header),
        *(adapters_pb2.DownloadAdapterResponse(data=piece) for piece in pieces),
    ]


FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": LARGE}

# ------------------------------------------------------------------------------------------------------- upload


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_the_files_of_an_adapter_are_sent_with_their_hashes(server, client, adapter, with_optimizer):
    there = client.upload_adapter("two", adapter, kind="reference", with_optimizer=with_optimizer, seed=3)

    names = ["adapter_config.json", "adapter_model.safetensors", *(["optimizer.safetensors"] * with_optimizer)]
    (header,) = server.requests["UploadAdapter"]
    assert [one.name for one in header.files] == names
    assert list(header.files) == [entry(name, (adapter / name).read_bytes()) for name in names]
    assert server.uploads["two"] == b"".join((adapter / name).read_bytes() for name in names)
    assert (header.kind, header.seed, header.replace) == (types_pb2.ADAPTER_KIND_REFERENCE, 3, False)
    assert (there.name, there.kind, there.source) == ("two", "reference", "uploaded")


def test_a_session_uploads_in_its_name(server, client, adapter):
    session = client.open_session("policy_1")
    session.upload_adapter("policy_1", str(adapter), replace=True, value_head=True)

    (header,) = server.requests["UploadAdapter"]
    assert (header.session_id, header.replace, header.value_head) == (session.id, True, True)


def test_an_upload_is_repeated_under_the_same_id_and_made_once(server, client, adapter):
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "connection lost", after_the_work=True)
    server.fail("UploadAdapter", EARLY, UNAVAILABLE, lost)

    client.upload_adapter("two", adapter)

    ids = [header.request_id for header in server.requests["UploadAdapter"]]
    assert (len(ids), len(set(ids)), len(server.stored)) == (3, 1, 1)
    assert server.uploads["two"] == (adapter / "adapter_config.json").read_bytes() + LARGE  # whole each time


def test_a_refused_upload_is_not_repeated(server, client, adapter):
    server.fail("UploadAdapter", Failure(grpc.StatusCode.DATA_LOSS, reason="HASH_MISMATCH", field="files[1].sha256"))

    with pytest.raises(DataLossError) as refused:
        client.upload_adapter("two", adapter)

    assert (refused.value.reason, refused.value.field) == ("HASH_MISMATCH", "files[1].sha256")
    assert len(server.requests["UploadAdapter"]) == 1


@pytest.mark.parametrize(
    ("missing", "more", "error", "word"),
    [
        ("adapter_config.json", None, NotFoundError, "save_pretrained"),
        ("adapter_model.safetensors", None, NotFoundError, "adapter_model.safetensors"),
        ("adapter_model.safetensors", "adapter_model.bin", InvalidArgumentError, "safe_serialization"),
    ],
)
def test_what_is_no_adapter_is_not_sent(server, client, adapter, missing, more, error, word):
    (adapter / missing).unlink()
    if more:
        (adapter / more).write_bytes(b"pickle")

    with pytest.raises(error, match=word) as refused:
        client.upload_adapter("two", adapter)

    assert (refused.value.field, bool(refused.value.reason)) == ("path", True)
    assert not server.requests["UploadAdapter"]


def test_a_directory_that_is_not_there_is_told(client, tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        client.upload_adapter("two", tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------- download


@pytest.fixture
def there(server):
    server.adapters["policy_1"] = types_pb2.Adapter(name="policy_1", kind=types_pb2.ADAPTER_KIND_POLICY)


@pytest.mark.parametrize("size", [7, 2**20, 2**24])
def test_a_download_is_written_as_it_was_sent(server, client, there, tmp_path, size):
    files = FILES if size > 7 else {name: data[:100] for name, data in FILES.items()}
    server.download = messages(files, size)

    saved = client.download_adapter("policy_1", tmp_path / "deep" / "policy", with_optimizer=True)

    assert contents(tmp_path / "deep" / "policy") == files
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["policy"]
    assert saved.path == str(tmp_path / "deep" / "policy")
    assert (saved.adapter, saved.bytes) == (AdapterVersion("policy_1", 5), sum(map(len, files.values())))
    (request,) = server.requests["DownloadAdapter"]
    assert (request.name, request.with_optimizer) == ("policy_1", True)


def test_a_download_is_begun_again_while_nothing_has_come(server, client, there, tmp_path):
    server.download = messages(FILES)
    server.fail("DownloadAdapter", UNAVAILABLE, UNAVAILABLE)

    client.download_adapter("policy_1", tmp_path / "policy")

    assert contents(tmp_path / "policy") == FILES


def named(name):
    return messages({"adapter_config.json": b"{}", name: b"x"})


BROKEN = {
    "another byte": (messages(FILES, data=b"{}" + LARGE[:-1] + bytes([LARGE[-1] ^ 1])), DataLossError),
    "a byte too few": (messages(FILES, data=b"{}" + LARGE[:-1]), DataLossError),
    "no data": (messages(FILES)[:1], DataLossError),
    "nothing": ([], DataLossError),
    "a byte too many": (messages(FILES, data=b"{}" + LARGE + b"!"), InternalError),
    "data first": (messages(FILES)[1:], InternalError),
    "two headers": ([*messages(FILES), messages(FILES)[0]], InternalError),
    "a way out": (named("../outside"), InternalError),
    "an absolute way out": (named("/tmp/outside"), InternalError),
    "a directory": (named(".."), InternalError),
    "no name": (named(""), InternalError),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_download_is_refused_and_leaves_nothing(server, client, there, tmp_path, case):
    server.download, error = BROKEN[case]
    before = tmp_path / "adapter"
    before.mkdir()
    (before / "adapter_config.json").write_text("before")

    for path, overwrite in ((tmp_path / "policy", False), (before, True)):
        with pytest.raises(error):
            client.download_adapter("policy_1", path, overwrite=overwrite)

    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert contents(before) == {"adapter_config.json": b"before"}


def test_a_download_that_breaks_off_is_told_and_leaves_nothing(server, client, there, tmp_path):
    def broken():
        yield from messages(FILES)[:2]
        raise RuntimeError("a bug")

    server.download = broken()

    with pytest.raises((InternalError, UnavailableError)):
        client.download_adapter("policy_1", tmp_path / "policy")

    assert not list(tmp_path.iterdir())


def test_only_an_adapter_is_overwritten_and_only_when_told(server, client, there, tmp_path):
    server.download = messages(FILES)
    path = tmp_path / "policy"
    client.download_adapter("policy_1", path)
    (path / "old.txt").write_text("old")

    with pytest.raises(AlreadyExistsError, match="overwrite"):
        client.download_adapter("policy_1", path)
    client.download_adapter("policy_1", path, overwrite=True)
    assert contents(path) == FILES
    (path / "adapter_config.json").unlink()
    with pytest.raises(AlreadyExistsError, match="not an adapter"):
        client.download_adapter("policy_1", path, overwrite=True)

    assert len(server.requests["DownloadAdapter"]) == 2  # the refused ones were not asked for
    assert [one.name for one in tmp_path.iterdir()] == ["policy"]


# ---------------------------------------------------------------------------------------------------- commands


def test_the_commands_send_and_fetch(server, run, adapter, there, tmp_path):
    done = run("adapters", "upload", "two", str(adapter), "--replace", "--value-head", "--kind", "reward")
    assert (done.code, done.out) == (0, "uploaded two, reward, version 7, 1.4 MiB\n")
    (header,) = server.requests["UploadAdapter"]
    assert (header.replace, header.value_head) == (True, True)

    server.download = messages(FILES)
    done = run("adapters", "download", "policy_1", str(tmp_path / "got"), "--with-optimizer")
    assert (done.code, done.out) == (0, f"downloaded policy_1 version 5 to {tmp_path / 'got'}, 2.0 MiB\n")
    assert contents(tmp_path / "got") == FILES
    done = run("adapters", "download", "policy_1", str(tmp_path / "got"))
    assert done.code == 1
    assert "overwrite" in done.err

    assert run("adapters", "save", "policy_1", "m", "--merged").code == 0
    assert server.requests["SaveAdapter"][-1].merged


def test_a_policy_is_saved_merged(server, client, there):
    session = client.open_session("policy_1")
    session.policy().save("one", merged=True)
    session.save_adapter("two", merged=True)
    client.save_adapter("policy_1", "three")

    assert [request.merged for request in server.requests["SaveAdapter"]] == [True, True, False]
