from __future__ import annotations

import threading

import grpc
import pytest
from server.conftest import furnish
from server.harness import Live, pair, refused

from onebase.server.config import EngineConfig, ServerConfig
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import (
    AdapterKind,
    CreateAdapterJob,
    DeleteAdapterJob,
    LoadAdapterJob,
    LoraSpec,
    SaveAdapterJob,
)
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2, types_pb2

A = adapters_pb2
POLICY, REWARD = types_pb2.ADAPTER_KIND_POLICY, types_pb2.ADAPTER_KIND_REWARD


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def live(root):
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, roots=(root,))
    with Live(config) as server:
        furnish(server)
        yield server


def names(live):
    return [one.name for one in live.adapters.ListAdapters(A.ListAdaptersRequest()).adapters]


def create(name, session="", **more):
    return A.CreateAdapterRequest(name=name, session_id=session, **more)


def load(name, session="", **more):
    return A.LoadAdapterRequest(**{"name": name, "session_id": session, "kind": POLICY, "path": "one", **more})


# ------------------------------------------------------------------------------------------------------- create


def test_a_policy_is_made_and_leased(live, session):
    made = live.adapters.CreateAdapter(create("new", session, value_head=True, seed=3))
    assert (made.name, made.kind, made.version, made.value_head, made.leased) == ("new", POLICY, 0, True, True)
    assert (made.lora.rank, made.lora.alpha, list(made.lora.target_modules)) == (16, 32, ["all-linear"])
    assert (made.source, made.parameter_count) == ("", 250)
    assert made.create_time > 1e9
    job = live.worker.executed[-1]
    assert (job.name, job.seed, job.lora) == ("new", 3, LoraSpec())
    assert live.adapters.GetAdapter(A.GetAdapterRequest(name="new")) == made
    assert live.adapters.CreateAdapter(create("free")).leased is False


def test_a_name_is_given_once(live, session):
    refusal = refused(live.adapters.CreateAdapter, create("p1"))
    assert (refusal.code, refusal.reason, refusal.field) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS", "name")


def test_a_name_is_reserved_while_its_adapter_is_made_and_free_again_if_that_fails(live):
    live.worker.hold(CreateAdapterJob)
    live.worker.failures.append(FailedPrecondition("NO_SUCH_MODULE", "no module is called so"))
    first = live.adapters.CreateAdapter.future(create("new"))
    live.worker.wait_submitted(CreateAdapterJob, 2)  # p1 was the first
    assert refused(live.adapters.CreateAdapter, create("new")).reason == "ADAPTER_EXISTS"
    assert refused(live.adapters.GetAdapter, A.GetAdapterRequest(name="new")).reason == "ADAPTER_NOT_FOUND"
    live.worker.release()
    assert isinstance(first.exception(timeout=20), grpc.RpcError)
    live.adapters.CreateAdapter(create("new"))


def test_a_cancelled_create_leaves_nothing(live):
    live.worker.hold(CreateAdapterJob)
    first = live.adapters.CreateAdapter.future(create("new"))
    job = live.worker.wait_submitted(CreateAdapterJob, 2)[-1]
    first.cancel()
    live.worker.wait_done(job)
    live.worker.release()
    live.adapters.CreateAdapter(create("new"))
    assert names(live) == ["new", "p1", "r1", "r2", "ref"]


def test_a_create_too_late_to_cancel_has_its_name(live):
    begun, go = threading.Event(), threading.Event()

    def slowly(job):
        if isinstance(job, CreateAdapterJob):
            begun.set()
            assert go.wait(20)

    live.worker.before = slowly
    request = create("new", request_id="r")
    first = live.adapters.CreateAdapter.future(request)
    assert begun.wait(20)
    first.cancel()
    go.set()
    live.worker.wait_done(live.worker.submitted[-1])
    assert live.adapters.CreateAdapter(request).name == "new"
    assert sum(isinstance(job, CreateAdapterJob) for job in live.worker.executed) == 2  # p1's and this


def test_adapters_are_listed_by_kind(live):
    assert names(live) == ["p1", "r1", "r2", "ref"]
    rewards = live.adapters.ListAdapters(A.ListAdaptersRequest(kind=REWARD)).adapters
    assert [one.name for one in rewards] == ["r1", "r2"]
    assert [one.num_labels for one in rewards] == [1, 1]


# ------------------------------------------------------------------------------------------------------- delete


def test_a_deleted_name_is_gone_at_once_and_its_memory_soon(live, session):
    uid = live.uid("p1")
    live.worker.hold(DeleteAdapterJob)
    live.adapters.DeleteAdapter(A.DeleteAdapterRequest(name="p1", session_id=session))
    assert names(live) == ["r1", "r2", "ref"]
    refusal = refused(live.adapters.GetAdapter, A.GetAdapterRequest(name="p1"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert list(live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)).leases) == []
    live.adapters.CreateAdapter(create("p1"))  # the name is free
    live.worker.release()
    (job,) = live.worker.wait_submitted(DeleteAdapterJob)
    live.worker.wait_done(job)
    assert job.adapter == uid
    assert live.uid("p1") != uid
    assert uid not in live.worker.adapters


def test_only_the_lease_holder_deletes_a_leased_policy(live, session):
    two = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    for other in ("", two):
        refusal = refused(live.adapters.DeleteAdapter, A.DeleteAdapterRequest(name="p1", session_id=other))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "NOT_LEASE_HOLDER")
    live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    live.adapters.DeleteAdapter(A.DeleteAdapterRequest(name="p1"))
    live.adapters.DeleteAdapter(A.DeleteAdapterRequest(name="r1"))
    assert names(live) == ["r2", "ref"]


def test_a_repeated_delete_is_answered_and_deletes_no_namesake(live):
    request = A.DeleteAdapterRequest(name="p1", request_id="d")
    live.adapters.DeleteAdapter(request)
    live.adapters.CreateAdapter(create("p1"))
    live.adapters.DeleteAdapter(request)
    assert "p1" in names(live)


# --------------------------------------------------------------------------------------------------------- load


def test_an_adapter_is_loaded_from_under_a_root(live, session, root):
    loaded = live.adapters.LoadAdapter(
        load("two", session, value_head=True, with_optimizer=True, seed=4, path="runs/two")
    )
    job = live.worker.executed[-1]
    assert (job.path, job.kind, job.value_head, job.with_optimizer, job.seed, job.least_version) == (
        root / "runs/two",
        AdapterKind.POLICY,
        True,
        True,
        4,
        0,
    )
    assert (loaded.source, loaded.leased) == (str(root / "runs/two"), True)
    reward = live.adapters.LoadAdapter(load("r3", session, kind=REWARD, path=str(root / "r")))
    assert (reward.kind, reward.leased, reward.num_labels) == (REWARD, False, 1)


@pytest.mark.parametrize("path", ["../one", "/etc", "link/one"])
def test_nothing_is_read_or_written_outside_the_roots(live, root, path):
    (root / "link").symlink_to(root.parent)
    submitted = len(live.worker.submitted)
    for call, request in (
        (live.adapters.LoadAdapter, load("two", path=path)),
        (live.adapters.SaveAdapter, A.SaveAdapterRequest(name="p1", path=path)),
    ):
        refusal = refused(call, request)
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "PATH_OUTSIDE_ROOTS",
            "path",
        )
    assert len(live.worker.submitted) == submitted
    live.adapters.CreateAdapter(create("two"))  # the refused load reserved nothing


def test_a_taken_name_is_not_loaded_over_unless_told(live):
    assert refused(live.adapters.LoadAdapter, load("p1")).reason == "ADAPTER_EXISTS"


def test_a_replacement_takes_the_name_with_the_next_version_and_frees_the_old(live, session):
    old = live.uid("p1")
    training = training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1})
    for _ in range(3):
        live.training.OptimStep(training)
    replaced = live.adapters.LoadAdapter(load("p1", session, replace=True))
    assert (replaced.version, replaced.leased) == (4, True)
    job = live.worker.wait_submitted(DeleteAdapterJob)[0]
    live.worker.wait_done(job)
    assert job.adapter == old
    assert live.training.OptimStep(training).adapter.version == 5
    now = live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session))
    assert (now.ppo_adapter_name, list(now.leases)) == ("p1", ["p1"])


def test_a_replacement_that_fails_leaves_what_was_there(live, session):
    old = live.uid("p1")
    live.worker.failures.append(FailedPrecondition("WRONG_BASE", "another base"))
    assert refused(live.adapters.LoadAdapter, load("p1", session, replace=True)).reason == "WRONG_BASE"
    assert live.uid("p1") == old
    assert old in live.worker.adapters
    live.adapters.LoadAdapter(load("p1", session, replace=True))


def test_until_it_is_there_a_replacement_changes_nothing_and_only_one_runs(live, session):
    old = live.uid("p1")
    live.worker.hold(LoadAdapterJob)
    first = live.adapters.LoadAdapter.future(load("p1", session, replace=True))
    live.worker.wait_submitted(LoadAdapterJob)
    logprob = inference_pb2.LogprobRequest(session_id=session, sequences=[pair((1,), (2,))])
    live.inference.Logprob(logprob)
    assert live.worker.executed[-1].rows[0].adapter == old
    refusal = refused(live.adapters.LoadAdapter, load("p1", session, replace=True))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ADAPTER_BUSY")
    live.worker.release()
    assert first.result(timeout=20).version == 1


def test_a_policy_stepped_while_it_is_replaced_keeps_its_place(live, session):
    """The new one would get a version that the old one has had: a version's numbers never change."""
    old = live.uid("p1")
    live.worker.hold(LoadAdapterJob)
    load_ = live.adapters.LoadAdapter.future(load("p1", session, replace=True))
    live.worker.wait_submitted(LoadAdapterJob)
    live.training.OptimStep(training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1}))
    live.worker.release()
    assert load_.code() is grpc.StatusCode.ABORTED
    assert live.uid("p1") == old
    live.worker.wait_done(live.worker.wait_submitted(DeleteAdapterJob)[0])
    assert old in live.worker.adapters
    assert max(live.worker.adapters) == live.uid("ref")  # the one that came too late is freed


def test_only_the_lease_holder_replaces_and_only_like_with_like(live, session):
    two = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    refusal = refused(live.adapters.LoadAdapter, load("p1", two, replace=True))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "NOT_LEASE_HOLDER")
    refusal = refused(live.adapters.LoadAdapter, load("p1", session, replace=True, kind=REWARD))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_ADAPTER_KIND")
    refusal = refused(live.adapters.LoadAdapter, load("p1", session))
    assert refusal.reason == "ADAPTER_EXISTS"
    assert live.adapters.LoadAdapter(load("r1", two, replace=True, kind=REWARD)).version == 1
    live.adapters.LoadAdapter(load("p1", session, replace=True))


def test_a_replacement_of_nothing_is_a_load(live, session):
    assert live.adapters.LoadAdapter(load("new", session, replace=True)).version == 0


# --------------------------------------------------------------------------------------------------------- save


def test_an_adapter_is_saved_under_a_root(live, root):
    request = A.SaveAdapterRequest(name="p1", path="out/p1", with_optimizer=True, overwrite=True)
    saved = live.adapters.SaveAdapter(request)
    assert (saved.path, saved.adapter.name, saved.adapter.version, saved.bytes) == (str(root / "out/p1"), "p1", 0, 77)
    job = live.worker.executed[-1]
    assert isinstance(job, SaveAdapterJob)
    assert (job.path, job.with_optimizer, job.overwrite) == (root / "out/p1", True, True)


def test_what_is_not_there_is_not_saved_and_no_other_directory_is_overwritten(live, root):
    assert refused(live.adapters.SaveAdapter, A.SaveAdapterRequest(name="p9", path="x")).reason == "ADAPTER_NOT_FOUND"
    (root / "thesis").mkdir()
    (root / "thesis/chapter1.txt").write_text("years of work")
    request = A.SaveAdapterRequest(name="p1", path="thesis", overwrite=True)
    refusal = refused(live.adapters.SaveAdapter, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_AN_ADAPTER")


def test_without_roots_the_flag_is_named():
    with Live() as live:
        furnish(live)
        refusal = refused(live.adapters.LoadAdapter, load("two"))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ROOTS")
        assert "--root" in refusal.message


# ------------------------------------------------------------------------------------------------------- server


def test_what_the_server_tells_of_itself(live):
    info = live.server.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert list(info.reward_adapters) == ["r1", "r2"]
    base = info.base
    assert (base.model, base.vocab_size, base.max_context, base.hidden_size) == ("fake", 1000, 64, 8)
    assert (base.pad_token_id, base.bos_token_id, list(base.eos_token_ids)) == (-1, 1, [2, 3])
    assert (base.dtype, base.quantization) == ("float32", "none")
    limits = info.limits
    assert (limits.max_rank, limits.max_message_bytes, limits.max_upload_bytes) == (512, 64 * 2**20, 4 * 2**30)
    assert info.version


def test_the_status_has_queues_adapters_and_memory(live):
    from dataclasses import replace

    uid = live.uid("p1")
    memory = live.worker.adapters[uid].memory
    live.worker.adapters[uid] = replace(live.worker.adapters[uid], memory=replace(memory, old_versions=5))
    status = live.server.GetStatus(server_pb2.GetStatusRequest())
    assert [queue.work for queue in status.queues] == ["admin", "interactive", "generate", "score", "train"]
    assert [queue.running for queue in status.queues] == [0, 0, 0, 0, 4]
    assert [one.name for one in status.adapters] == ["p1", "r1", "r2", "ref"]
    assert (status.adapters[0].memory.weights_bytes, status.adapters[0].memory.old_version_bytes) == (1000 + uid, 5)
    assert (status.kv_slots_used, status.kv_slots, status.kv_cache_bytes, status.base_bytes) == (5, 32, 4096, 49380)
    rates = (status.generated_tokens_per_second, status.scored_tokens_per_second, status.trained_tokens_per_second)
    assert rates == (1.5, 2.5, 3.5)
    assert 10**7 < status.rss_bytes <= status.peak_rss_bytes
    assert status.uptime_seconds > 0
