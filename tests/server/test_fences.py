"""Training calls while their adapter is being replaced: one that is answered is never lost."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest
from server.conftest import furnish
from server.harness import Live, eventually, pair, refused

from onebase.server.config import EngineConfig, ServerConfig
from onebase.server.durability import Volatile
from onebase.server.jobs import DeleteAdapterJob, LoadAdapterJob, OptimStepJob
from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2, types_pb2

BUSY = (grpc.StatusCode.ABORTED, "ADAPTER_BUSY")


class Held(Volatile):
    """Holds the commit of every adapter that comes until it is let go."""

    def __init__(self):
        self.reached, self.free = threading.Event(), threading.Event()
        self.free.set()

    async def add(self, entry, record, lessee):
        self.reached.set()
        await asyncio.to_thread(self.free.wait, 20)


@pytest.fixture
def keeper():
    return Held()


@pytest.fixture
def live(tmp_path, keeper):
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, roots=(tmp_path,))
    with Live(config, keeper=keeper) as server:
        furnish(server)
        keeper.reached.clear()
        yield server


@pytest.fixture
def session(live):
    return live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="p1")).session_id


def step(session):
    return training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1e-3})


def batch(session):
    sequences = [training_pb2.TrainingSequence(sequence=pair((9,), (7,)))]
    return training_pb2.ForwardBackwardRequest(session_id=session, sequences=sequences, cross_entropy={})


def load(session):
    kind = types_pb2.ADAPTER_KIND_POLICY
    return adapters_pb2.LoadAdapterRequest(session_id=session, name="p1", path="x", kind=kind, replace=True)


def version(live):
    return live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p1")).version


def test_while_a_replacement_is_committed_no_training_call_is_answered(live, session, keeper):
    old = live.uid("p1")
    live.training.ForwardBackward(batch(session))
    keeper.free.clear()
    replacing = live.adapters.LoadAdapter.future(load(session))
    assert keeper.reached.wait(20)
    for method, request in (
        (live.training.OptimStep, step(session)),
        (live.training.ForwardBackward, batch(session)),
    ):
        refusal = refused(method, request)
        assert (refusal.code, refusal.reason) == BUSY
        assert 0 < refusal.retry_after < 1
    keeper.free.set()
    assert replacing.result(timeout=20).version == 1
    assert live.uid("p1") != old
    assert not [job for job in live.worker.executed if isinstance(job, OptimStepJob)]
    live.training.ForwardBackward(batch(session))
    assert live.training.OptimStep(step(session)).adapter.version == 2


def test_a_step_under_way_is_answered_and_the_replacement_gives_way(live, session):
    old = live.uid("p1")
    live.training.ForwardBackward(batch(session))
    live.worker.hold(OptimStepJob)
    stepping = live.training.OptimStep.future(step(session))
    live.worker.wait_submitted(OptimStepJob)
    replacing = live.adapters.LoadAdapter.future(load(session))
    (loading,) = live.worker.wait_submitted(LoadAdapterJob)
    live.worker.wait_done(loading)
    time.sleep(0.1)
    assert not replacing.done()
    live.worker.release()
    assert stepping.result(timeout=20).adapter.version == 1
    with pytest.raises(grpc.RpcError) as told:
        replacing.result(timeout=20)
    assert told.value.code() is grpc.StatusCode.ABORTED
    assert "stepped to version 1" in told.value.details()
    assert (live.uid("p1"), version(live)) == (old, 1)


def test_a_deletion_waits_for_a_step_under_way_and_what_comes_after_goes_on_from_it(live, session):
    live.training.ForwardBackward(batch(session))
    live.worker.hold(OptimStepJob)
    stepping = live.training.OptimStep.future(step(session))
    live.worker.wait_submitted(OptimStepJob)
    deleting = live.adapters.DeleteAdapter.future(adapters_pb2.DeleteAdapterRequest(session_id=session, name="p1"))
    eventually(lambda: live.edge.fences._shut)
    refusal = refused(live.training.ForwardBackward, batch(session))
    assert (refusal.code, refusal.reason) == BUSY
    assert not deleting.done()
    live.worker.release()
    assert stepping.result(timeout=20).adapter.version == 1
    deleting.result(timeout=20)
    assert refused(version, live).reason == "ADAPTER_NOT_FOUND"
    made = live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=session, name="p1"))
    assert made.version == 2


@pytest.mark.parametrize("way", ["deadline", "cancel"])
def test_a_replacement_that_is_given_up_while_it_waits_leaves_nothing(live, session, way):
    live.training.ForwardBackward(batch(session))
    live.worker.hold(OptimStepJob)
    stepping = live.training.OptimStep.future(step(session))
    live.worker.wait_submitted(OptimStepJob)
    replacing = live.adapters.LoadAdapter.future(load(session), timeout=0.5 if way == "deadline" else 20)
    (loading,) = live.worker.wait_submitted(LoadAdapterJob)
    live.worker.wait_done(loading)
    time.sleep(0.1)
    if way == "cancel":
        replacing.cancel()
    else:
        assert replacing.exception(timeout=20).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    (discarded,) = live.worker.wait_submitted(DeleteAdapterJob)
    assert discarded.adapter == loading.uid
    live.worker.release()
    assert stepping.result(timeout=20).adapter.version == 1
    live.training.ForwardBackward(batch(session))
    assert live.training.OptimStep(step(session)).adapter.version == 2  # the fence is gone


def test_of_a_client_that_steps_all_the_time_no_answered_step_is_lost(live, session, keeper):
    """Whatever the order, a version is answered once, and each is one more than the last."""
    stop, answered = threading.Event(), []

    def train():
        while not stop.is_set():
            try:
                live.training.ForwardBackward(batch(session))
                answered.append(live.training.OptimStep(step(session)).adapter.version)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.ABORTED, error  # noqa: PT017

    thread = threading.Thread(target=train)
    thread.start()
    replaced = []
    until = time.monotonic() + 3
    try:
        while time.monotonic() < until or not replaced:
            try:
                replaced.append(live.adapters.LoadAdapter(load(session)).version)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.ABORTED, error  # noqa: PT017
    finally:
        stop.set()
        thread.join(20)
    assert sorted([*answered, *replaced]) == list(range(1, version(live) + 1))
