"""What one session does reaches no other: leases, gradients, errors; and people are not kept waiting."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from e2e.conftest import READERS, REWARDS, TRAINEES
from support import RunningServer

from onebase.client import (
    AbortedError,
    AdamW,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    PpoLoss,
    SamplingParams,
    Sequence,
    TrainingSequence,
    connect,
)

pytestmark = pytest.mark.e2e


def batch(count: int = 4, length: int = 12) -> list[TrainingSequence]:
    numbers = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        arrays = [numbers.normal(size=length).astype(np.float32) for _ in range(4)]
        rows.append(TrainingSequence([5, 6, 7], numbers.integers(4, 120, length), arrays[0] * 0.1 - 4, *arrays[1:]))
    return rows


def test_gradients_of_a_session_that_ended_do_not_reach_the_next_holder(client: Client) -> None:
    with client.open_session(TRAINEES[0]) as first:
        assert first.forward_backward(batch()).pending_gradients == 1
    with client.open_session(TRAINEES[0]) as second:
        with pytest.raises(FailedPreconditionError, match="no gradients"):
            second.optim_step(AdamW(1e-3))
        assert second.forward_backward(batch()).pending_gradients == 1
        assert second.optim_step(AdamW(0.0)).gradients_applied == 1


def test_only_the_holder_of_the_lease_may_change_a_policy(client: Client, server: RunningServer) -> None:
    with client.open_session(TRAINEES[1]), connect(server.address) as other, other.open_session() as stranger:
        before = client.adapter(TRAINEES[1])
        for change in (
            lambda: stranger.forward_backward(batch(), adapter=TRAINEES[1]),
            lambda: stranger.optim_step(AdamW(1.0), adapter=TRAINEES[1]),
            lambda: stranger.load_adapter(TRAINEES[1], "policy", replace=True),
            lambda: stranger.delete_adapter(TRAINEES[1]),
        ):
            with pytest.raises(AbortedError) as caught:
                change()
            assert caught.value.reason == "NOT_LEASE_HOLDER"
        assert client.adapter(TRAINEES[1]) == before


def test_a_loss_that_is_not_finite_is_refused_and_changes_nothing(client: Client) -> None:
    with client.open_session(TRAINEES[2]) as session:
        session.forward_backward(batch())
        before = client.adapter(TRAINEES[2])
        for bad in (np.nan, np.inf):
            rows = batch()
            rows[1].advantages[3] = bad
            with pytest.raises(InvalidArgumentError, match=r"sequences\[1\].advantages"):
                session.forward_backward(rows)
        huge = batch()
        for row in huge:
            row.old_logprobs[:] = -3e38  # finite in the request, infinite in the ratio
        with pytest.raises(FailedPreconditionError) as caught:
            session.forward_backward(huge, PpoLoss())
        assert caught.value.reason == "NONFINITE_LOSS"
        assert client.adapter(TRAINEES[2]) == before


def test_a_person_waits_for_a_few_engine_steps_at_most_while_others_train_and_generate(
    client: Client, server: RunningServer
) -> None:
    stop = threading.Event()

    def train(name: str) -> None:
        with connect(server.address) as own, own.open_session(name) as session:
            while not stop.is_set():
                session.forward_backward(batch(40))

    def generate(name: str) -> None:
        with connect(server.address) as own, own.open_session(name) as session:
            while not stop.is_set():
                sampling = SamplingParams(max_new_tokens=60, n=8, ignore_eos=True)
                session.generate([[5, 6]] * 4, sampling=sampling)
                session.logprob([Sequence([5], [6] * 60)] * 40)

    threads = [threading.Thread(target=train, args=(name,)) for name in TRAINEES[:2]]
    threads += [threading.Thread(target=generate, args=(name,)) for name in READERS[:2]]
    for thread in threads:
        thread.start()
    try:
        waited = []
        for _ in range(15):
            stop.wait(0.1)
            before = client.status().engine_steps
            client.reward([Sequence("w5 w6", "w7")], REWARDS)
            waited.append(client.status().engine_steps - before)
        assert client.status().engine_steps > 50, "nothing else was running"
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    # the step under way, its own, and those that fit between the calls that count them
    assert sorted(waited)[len(waited) // 2] <= 6, waited
