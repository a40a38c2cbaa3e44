"""Peers that die, freeze, hang up or come too late."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import grpc
import pytest
from faults.conftest import Place, endless
from server.harness import floats, pair, refused, tokens_of

from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2, types_pb2

pytestmark = pytest.mark.e2e


def test_4_a_server_killed_in_a_stream_is_unavailable(make_place: Callable[..., Place]) -> None:
    place = make_place()
    stream = place.as_("red").inference.Generate(endless())
    next(stream)
    os.kill(place.server.process.pid, signal.SIGKILL)
    refusal = refused(lambda: stream)
    assert refusal.code is grpc.StatusCode.UNAVAILABLE


def test_5_of_a_client_killed_in_a_stream_nothing_is_kept(place: Place, reader: subprocess.Popen[str]) -> None:
    assert place.status().kv_slots_used == 2
    reader.kill()
    assert place.wait_until(lambda now: now.kv_slots_used == 0, 5) < 5


def test_6_a_frozen_client_is_noticed_within_seconds(place: Place, reader: subprocess.Popen[str]) -> None:
    os.kill(reader.pid, signal.SIGSTOP)
    try:
        assert place.status().kv_slots_used == 2
        place.wait_until(lambda now: now.kv_slots_used == 0, 15)
    finally:
        os.kill(reader.pid, signal.SIGCONT)


def logprob() -> inference_pb2.LogprobRequest:
    return inference_pb2.LogprobRequest(adapter="base", sequences=[pair((5, 6), (7,))] * 64)


def test_7_what_is_too_late_in_the_queue_is_never_executed(place: Place) -> None:
    red = place.as_("red")
    with_work = red.inference.Generate(endless())
    next(with_work)
    refusal = refused(red.inference.Logprob, logprob(), timeout=0.003)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    with_work.cancel()


def trainer(place: Place, name: str) -> tuple[object, str]:
    """A client, and a session that may train a fresh policy and has a gradient of it."""
    red = place.as_("red")
    red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=name, value_head=True))
    session = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name=name)).session_id
    red.training.ForwardBackward(passes(session))
    return red, session


def passes(session: str, old: float = -4.0, advantage: float = 0.5) -> training_pb2.ForwardBackwardRequest:
    row = training_pb2.TrainingSequence(
        sequence=types_pb2.Sequence(prompt=tokens_of(5, 6), completion=tokens_of(7, 8, 9)),
        old_logprobs=floats(old, old, old),
        old_values=floats(0, 0, 0),
        advantages=floats(advantage, -1, 1),
        returns=floats(1, 1, 1),
    )
    return training_pb2.ForwardBackwardRequest(session_id=session, sequences=[row] * 2, ppo={})


def step(session: str, request_id: str) -> training_pb2.OptimStepRequest:
    return training_pb2.OptimStepRequest(session_id=session, request_id=request_id, adamw={"learning_rate": 1e-3})


@pytest.mark.parametrize("milliseconds", [1, 3, 10, 30])
def test_8_a_step_that_is_too_late_is_done_once_or_not_at_all(place: Place, milliseconds: int) -> None:
    red, session = trainer(place, f"late-{milliseconds}")
    first = red.training.OptimStep.future(step(session, "a"), timeout=milliseconds / 1000)
    assert first.code() in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
    between = red.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=f"late-{milliseconds}"))
    assert between.version in (0, 1)
    # Asked for by its request_id: it is done once, whichever it was.
    assert red.training.OptimStep(step(session, "a")).adapter.version == 1
    assert red.training.OptimStep(step(session, "a")).adapter.version == 1
    refusal = refused(red.training.OptimStep, step(session, "b"))  # 33: no gradients are left
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_GRADIENTS")


def test_9_a_cancel_ends_the_work(place: Place) -> None:
    stream = place.as_("red").inference.Generate(endless())
    next(stream)
    assert place.status().kv_slots_used == 2
    began = time.monotonic()
    stream.cancel()
    with pytest.raises(grpc.RpcError) as told:
        list(stream)
    assert told.value.code() is grpc.StatusCode.CANCELLED
    place.wait_until(lambda now: now.kv_slots_used == 0, 5)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_15_numbers_that_are_not_finite_are_refused(place: Place, bad: float) -> None:
    red, session = trainer(place, f"finite-{bad}")
    for request, field in ((passes(session, advantage=bad), "advantages"), (passes(session, old=bad), "old_logprobs")):
        refusal = refused(red.training.ForwardBackward, request)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"sequences[0].{field}")
    rate = training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": bad})
    assert refused(red.training.OptimStep, rate).code is grpc.StatusCode.INVALID_ARGUMENT


def test_16_a_loss_that_is_not_finite_changes_no_bit(place: Place) -> None:
    red, session = trainer(place, "steady")

    def bits() -> bytes:
        request = adapters_pb2.DownloadAdapterRequest(name="steady")
        return b"".join(part.data for part in red.adapters.DownloadAdapter(request))

    before = bits()
    assert len(before) > 1000
    refusal = refused(red.training.ForwardBackward, passes(session, old=-3e38))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NONFINITE_LOSS")
    assert bits() == before
    assert red.training.OptimStep(step(session, "a")).gradients_applied == 1  # the good pass is still there
    assert bits() != before
