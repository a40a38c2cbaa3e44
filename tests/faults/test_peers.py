"""Peers that die, freeze, hang up or come too late."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import grpc
import pytest
from faults.conftest import ENDED, Place, at_rest, downloaded, endless, fresh
from server.harness import floats, refused, tokens_of
from server.tenants import Client

from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2, types_pb2

pytestmark = pytest.mark.e2e


@pytest.mark.fault(4, times=2)
def test_4_a_server_killed_in_a_stream_is_unavailable(make_place: Callable[..., Place]) -> None:
    place = make_place()
    stream = place.as_("red").inference.Generate(endless())
    next(stream)
    os.kill(place.server.process.pid, signal.SIGKILL)
    refusal = refused(lambda: stream)
    assert refusal.code is grpc.StatusCode.UNAVAILABLE


def test_5_of_a_client_killed_in_a_stream_nothing_is_kept(place: Place, reader: subprocess.Popen[str]) -> None:
    assert place.status().kv_slots_used == 2
    with place.ends_within(ENDED):
        reader.kill()


@pytest.mark.fault(6, times=3)
def test_6_a_frozen_client_is_noticed_within_seconds(
    place: Place, reader: subprocess.Popen[str], seen: Callable[..., None]
) -> None:
    os.kill(reader.pid, signal.SIGSTOP)
    try:
        assert place.status().kv_slots_used == 2
        place.wait_until(at_rest, 10)  # a ping after 5 s, and 3 s for its answer
    finally:
        os.kill(reader.pid, signal.SIGCONT)
    assert reader.stdout is not None
    *_, last = reader.stdout  # it wakes up, reads what had come, and is told
    seen(last.strip())
    assert last == "UNAVAILABLE\n"


def test_7_what_is_too_late_in_the_queue_is_never_executed(place: Place) -> None:
    name = fresh("queued")
    red, session = trainer(place, name)
    long = red.training.ForwardBackward.future(passes(session, count=400))  # passes of one adapter keep their order
    refusal = refused(red.training.ForwardBackward, passes(session), timeout=0.02)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not long.done()
    long.result(60)
    assert red.training.ForwardBackward(passes(session)).pending_gradients == 3  # the first, the long one, and this
    assert red.training.OptimStep(step(session, "a")).gradients_applied == 3


def trainer(place: Place, name: str) -> tuple[Client, str]:
    """A client, and a session that may train a fresh policy and has a gradient of it."""
    red = place.as_("red")
    red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=name, value_head=True, seed=3))
    session = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name=name)).session_id
    red.training.ForwardBackward(passes(session))
    return red, session


def bits(client: Client, name: str) -> bytes:
    """Everything of an adapter, its optimizer and its version included."""
    request = adapters_pb2.DownloadAdapterRequest(name=name, with_optimizer=True)
    return b"".join(part.data for part in client.adapters.DownloadAdapter(request))


def passes(
    session: str, old: float = -4.0, advantage: float = 0.5, count: int = 2
) -> training_pb2.ForwardBackwardRequest:
    row = training_pb2.TrainingSequence(
        sequence=types_pb2.Sequence(prompt=tokens_of(5, 6), completion=tokens_of(7, 8, 9)),
        old_logprobs=floats(old, old, old),
        old_values=floats(0, 0, 0),
        advantages=floats(advantage, -1, 1),
        returns=floats(1, 1, 1),
    )
    return training_pb2.ForwardBackwardRequest(session_id=session, sequences=[row] * count, ppo={})


def step(session: str, request_id: str) -> training_pb2.OptimStepRequest:
    return training_pb2.OptimStepRequest(session_id=session, request_id=request_id, adamw={"learning_rate": 1e-3})


def test_8_a_step_that_is_too_late_is_done_once_or_not_at_all(place: Place, seen: Callable[..., None]) -> None:
    """The deadlines are of the time that a step takes here: before it, within it, and now and then after it."""
    name = fresh("in-time")
    red, session = trainer(place, name)
    began = time.monotonic()
    assert red.training.OptimStep(step(session, "a")).adapter.version == 1
    seconds = time.monotonic() - began
    wanted = downloaded(red, name)
    codes = [too_late(place, seconds * part, wanted) for part in (0.1, 0.5, 1, 2)]
    assert grpc.StatusCode.DEADLINE_EXCEEDED in codes
    for code in codes:
        seen(code)


def too_late(place: Place, seconds: float, wanted: tuple[int, dict[str, bytes]]) -> grpc.StatusCode:
    """What a client is told of a step with this deadline, of which all or nothing is there."""
    name = fresh("late")
    red, session = trainer(place, name)
    before = downloaded(red, name)
    first = red.training.OptimStep.future(step(session, "a"), timeout=seconds)
    assert first.code() in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
    between = red.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name))
    # All or nothing: its gradients wait and nothing has changed, or they are used up and everything has.
    assert (between.version, between.pending_gradients) in ((0, 1), (1, 0))
    assert downloaded(red, name) in (before, wanted)  # later than that, so the step may be made meanwhile
    # Asked for by its request_id: it is done once, whichever it was.
    assert red.training.OptimStep(step(session, "a")).adapter.version == 1
    assert red.training.OptimStep(step(session, "a")).adapter.version == 1
    assert downloaded(red, name) == wanted
    refusal = refused(red.training.OptimStep, step(session, "b"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_GRADIENTS")
    return first.code()


def test_33_a_step_without_gradients_is_refused(place: Place) -> None:
    name = fresh("idle")
    red, session = trainer(place, name)
    assert red.training.OptimStep(step(session, "a")).adapter.version == 1
    before = bits(red, name)
    for request_id in ("b", "", "b"):
        refusal = refused(red.training.OptimStep, step(session, request_id))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_GRADIENTS")
    assert bits(red, name) == before


def test_32_a_writer_whose_lease_or_version_is_stale_is_aborted(place: Place) -> None:
    name = fresh("leased")
    red, session = trainer(place, name)
    before = bits(red, name)
    other = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    late = training_pb2.OptimStepRequest(session_id=other, adapter=name, adamw={"learning_rate": 1e-3})
    again = passes(other)
    again.adapter = name
    stale = step(session, "a")
    stale.expected_version = 5
    for method, request, reason in (
        (red.training.OptimStep, late, "NOT_LEASE_HOLDER"),
        (red.training.ForwardBackward, again, "NOT_LEASE_HOLDER"),
        (
            red.adapters.DeleteAdapter,
            adapters_pb2.DeleteAdapterRequest(session_id=other, name=name),
            "NOT_LEASE_HOLDER",
        ),
        (red.sessions.OpenSession, sessions_pb2.OpenSessionRequest(ppo_adapter_name=name), "ADAPTER_LEASED"),
        (red.training.OptimStep, stale, "VERSION_MISMATCH"),
    ):
        refusal = refused(method, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, reason)
    assert bits(red, name) == before
    assert red.training.OptimStep(step(session, "b")).gradients_applied == 1  # the holder's own gradient alone


def test_32_a_holder_that_was_away_for_its_ttl_finds_the_lease_taken(place: Place) -> None:
    name = fresh("lapsed")
    red = place.as_("red")
    red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=name, value_head=True))
    opened = sessions_pb2.OpenSessionRequest(ppo_adapter_name=name, ttl_seconds=1)
    away = red.sessions.OpenSession(opened).session_id
    red.training.ForwardBackward(passes(away))
    until = time.monotonic() + 20
    while red.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name)).leased:
        assert time.monotonic() < until
        time.sleep(0.1)
    holder = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name=name)).session_id
    red.training.ForwardBackward(passes(holder))
    before = bits(red, name)
    refusal = refused(red.training.OptimStep, step(away, "a"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    # It comes back as clients do: with its id, which is no session any more, and in another one.
    back = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(resume_session_id=away)).session_id
    assert back not in (away, holder)
    late = step(back, "a")
    late.adapter = name
    again = passes(back)
    again.adapter = name
    for method, request in ((red.training.OptimStep, late), (red.training.ForwardBackward, again)):
        refusal = refused(method, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "NOT_LEASE_HOLDER")
    assert bits(red, name) == before
    assert red.training.OptimStep(step(holder, "a")).gradients_applied == 1


def test_34_a_name_that_is_taken_is_refused(place: Place) -> None:
    name = fresh("twice")
    red, _ = trainer(place, name)
    before = bits(red, name)
    refusal = refused(red.adapters.CreateAdapter, adapters_pb2.CreateAdapterRequest(name=name))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS")
    assert bits(red, name) == before


def test_9_a_cancel_ends_the_work(place: Place) -> None:
    stream = place.as_("red").inference.Generate(endless())
    next(stream)
    assert place.status().kv_slots_used == 2
    with place.ends_within(ENDED):
        stream.cancel()
        assert refused(list, stream).code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_15_numbers_that_are_not_finite_are_refused(place: Place, bad: float) -> None:
    name = fresh("finite")
    red, session = trainer(place, name)
    before = bits(red, name)
    for request, field in ((passes(session, advantage=bad), "advantages"), (passes(session, old=bad), "old_logprobs")):
        refusal = refused(red.training.ForwardBackward, request)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"sequences[0].{field}")
    rate = training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": bad})
    refusal = refused(red.training.OptimStep, rate)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "adamw.learning_rate")
    assert bits(red, name) == before
    assert red.training.OptimStep(step(session, "a")).gradients_applied == 1


def test_16_a_loss_that_is_not_finite_changes_no_bit(place: Place) -> None:
    name = fresh("steady")
    red, session = trainer(place, name)
    before = bits(red, name)
    tensors = downloaded(red, name)[1]
    refusal = refused(red.training.ForwardBackward, passes(session, old=-3e38))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NONFINITE_LOSS")
    assert bits(red, name) == before
    assert red.training.OptimStep(step(session, "a")).gradients_applied == 1  # the good pass is still there
    for file, data in downloaded(red, name)[1].items():
        assert data != tensors.get(file), file
