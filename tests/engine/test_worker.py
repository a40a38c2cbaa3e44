"""The worker: one bad job ends alone; cancels, deadlines, limits and drains are kept."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from engine.conftest import Run, generation, texts
from engine.test_mixed import row, train_rows

from onebase.server.config import Limits
from onebase.server.engine import Engine
from onebase.server.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from onebase.server.jobs import (
    BASE,
    CompletionChunk,
    DeleteAdapterJob,
    DescribeAdaptersJob,
    FinishReason,
    ForwardBackwardJob,
    PpoLoss,
    ScoreJob,
    ScoreRow,
)
from onebase.server.worker import Worker


def block(worker: Worker) -> threading.Event:
    """Holds the worker's thread in a job until the event is set."""
    go, inside = threading.Event(), threading.Event()
    job, _ = generation(1, [texts(1)[0][:3]], max_new_tokens=1)

    def wait(_: CompletionChunk) -> None:
        inside.set()
        go.wait(30)

    job.emit = wait
    worker.submit(job)
    assert inside.wait(30)
    return go


def test_a_job_that_fails_in_a_shared_step_fails_alone(worker: Worker) -> None:
    go = block(worker)
    good = ScoreJob(rows=[row(1, texts(1)[0])])
    bad = ScoreJob(rows=[ScoreRow(BASE, texts(1)[0], 3, values=True)])  # the base has no value head
    generating, chunks = generation(2, [texts(1)[0][:4]])
    for job in (good, bad, generating):
        worker.submit(job)
    go.set()
    assert good.done.result(30).rows[0].logprobs is not None
    with pytest.raises(FailedPrecondition, match="value head"):
        bad.done.result(30)
    generating.done.result(30)
    assert chunks[0, 0][0].finish_reason is not None


def test_a_bug_becomes_an_opaque_id(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def secret(*_: Any) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(engine, "step", secret)
    with pytest.raises(Internal) as caught:
        run(ScoreJob(rows=[row(1, texts(1)[0])]))
    assert "secret" not in caught.value.message
    monkeypatch.undo()
    assert run(ScoreJob(rows=[row(1, texts(1)[0])])).rows[0].logprobs is not None


@pytest.mark.fault(5)
def test_a_cancelled_completion_stops_within_a_step_and_frees_its_place(worker: Worker, engine: Engine) -> None:
    job, chunks = generation(1, [texts(1)[0][:4]], n=3, max_new_tokens=80, ignore_eos=True, stream_tokens=True)
    emit = job.emit

    def cancel_at_ten(chunk: CompletionChunk) -> None:
        emit(chunk)
        if len(chunks[0, 0]) == 10:
            job.cancel()

    job.emit = cancel_at_ten
    worker.submit(job)
    with pytest.raises(Cancelled):
        job.done.result(30)
    assert max(len(parts) for parts in chunks.values()) <= 11
    assert engine.kv.used == 0
    assert engine.adapters[1].weights.readers == 0


def test_a_deadline_that_passes_in_the_queue_means_never_executed(worker: Worker, engine: Engine) -> None:
    go = block(worker)
    job = ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss(), deadline=time.monotonic() + 0.05)
    worker.submit(job)
    time.sleep(0.1)
    go.set()
    with pytest.raises(DeadlineExceeded):
        job.done.result(30)
    assert engine.adapters[1].pending == 0


def test_a_step_that_does_not_end_is_seen_from_outside(worker: Worker) -> None:
    go = block(worker)
    time.sleep(0.3)
    assert 0.2 < worker.stuck_seconds() < 20
    go.set()
    until = time.monotonic() + 20
    while worker.stuck_seconds() > 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    assert worker.stuck_seconds() == 0  # having nothing to do is no trouble


def test_a_pass_cancelled_between_its_steps_leaves_nothing_behind(worker: Worker, engine: Engine) -> None:
    job = ForwardBackwardJob(adapter=1, rows=train_rows(1, count=400), loss=PpoLoss())
    worker.submit(job)
    time.sleep(0.05)
    job.cancel()
    with pytest.raises(Cancelled):
        job.done.result(30)
    assert not engine.adapters[1].gradients
    assert engine.adapters[1].pending == 0


def test_limits_refuse_and_say_when_to_come_back(engine: Engine) -> None:
    worker = Worker(engine, Limits(max_queued_requests=3, max_queued_requests_per_session=2))  # not started: all wait

    def job(session: str) -> ScoreJob:
        return ScoreJob(rows=[row(BASE, texts(1)[0])], session=session)

    for _ in range(2):
        worker.submit(job("flood"))
    with pytest.raises(ResourceExhausted) as caught:
        worker.submit(job("flood"))
    assert caught.value.reason == "SESSION_QUEUE_FULL"
    assert caught.value.retry_after
    worker.submit(job("other"))
    with pytest.raises(ResourceExhausted) as caught:
        worker.submit(job("third"))
    assert caught.value.reason == "QUEUE_FULL"
    worker.start()
    worker.stop(10.0)


def test_drain_refuses_new_jobs_and_lets_running_ones_finish(worker: Worker) -> None:
    go = block(worker)
    job = ScoreJob(rows=[row(1, texts(1)[0])])
    worker.submit(job)
    stopping = threading.Thread(target=worker.stop, args=(30.0,))
    stopping.start()
    while not worker._draining:
        time.sleep(0.01)
    with pytest.raises(Unavailable):
        worker.submit(ScoreJob(rows=[row(1, texts(1)[0])]))
    go.set()
    stopping.join(30)
    assert job.done.result(0).rows[0].logprobs is not None


def test_what_does_not_finish_in_the_drain_is_told_so(worker: Worker) -> None:
    job, _ = generation(1, [texts(1)[0][:4]], max_new_tokens=90, ignore_eos=True, stream_tokens=True)
    emit = job.emit
    job.emit = lambda chunk: (emit(chunk), time.sleep(0.05))[0]
    worker.submit(job)
    worker.stop(0.1)
    with pytest.raises(Unavailable):
        job.done.result(0)


def test_a_deleted_adapter_serves_its_running_completions_and_nobody_else(worker: Worker, run: Run) -> None:
    job, chunks = generation(1, [texts(1)[0][:4]], seed=2, max_new_tokens=40, ignore_eos=True)
    run(job)
    begun = threading.Event()
    again, parts = generation(1, [texts(1)[0][:4]], seed=2, max_new_tokens=40, ignore_eos=True, stream_tokens=True)
    emit = again.emit
    again.emit = lambda chunk: (emit(chunk), begun.set(), time.sleep(0.002))[0]
    worker.submit(again)
    assert begun.wait(30)
    run(DeleteAdapterJob(adapter=1))
    assert 1 not in run(DescribeAdaptersJob())
    with pytest.raises(NotFound):
        run(ScoreJob(rows=[row(1, texts(1)[0])]))
    again.done.result(30)
    assert tuple(t for part in parts[0, 0] for t in part.tokens) == chunks[0, 0][0].tokens


def test_a_deletion_lets_what_came_before_it_be_answered(worker: Worker, run: Run, engine: Engine) -> None:
    """Under the name is another adapter by then, and whoever asked for it must not be told that there is none."""
    step = engine.step
    reached, free = threading.Event(), threading.Event()

    def held(*args: Any, **named: Any) -> Any:
        reached.set()
        free.wait(30)
        return step(*args, **named)

    engine.step = held  # type: ignore[method-assign]
    first, second = (ScoreJob(rows=[row(uid, texts(1)[0])]) for uid in (2, 1))
    worker.submit(first)
    assert reached.wait(30)
    deleting = DeleteAdapterJob(adapter=1)
    worker.submit(second)
    worker.submit(deleting)
    free.set()
    assert second.done.result(30).versions == {1: 0}
    deleting.done.result(30)
    with pytest.raises(NotFound):
        run(ScoreJob(rows=[row(1, texts(1)[0])]))


def test_stop_tokens_eos_and_least_lengths(run: Run, engine: Engine) -> None:
    prompt = [texts(1)[0][:4]]
    job, free = generation(1, prompt, seed=4, max_new_tokens=30, ignore_eos=True)
    run(job)
    tokens = free[0, 0][0].tokens
    stop = tokens[5]
    at = tokens.index(stop)
    job, stopped = generation(1, prompt, seed=4, max_new_tokens=30, ignore_eos=True, stop_token_ids=(stop,))
    run(job)
    assert stopped[0, 0][0].tokens == tokens[: at + 1]
    assert stopped[0, 0][0].finish_reason is FinishReason.STOP_TOKEN
    job, longer = generation(1, prompt, seed=4, max_new_tokens=30, stop_token_ids=(stop,), min_new_tokens=20)
    run(job)
    found = longer[0, 0][0].tokens
    assert len(found) >= 20
    assert not set(found[:20]) & {stop, *engine.facts.eos_token_ids}


def test_a_stop_string_ends_a_completion_and_is_cut_from_its_text(run: Run, engine: Engine) -> None:
    prompt = [texts(1)[0][:4]]
    job, free = generation(1, prompt, seed=4, max_new_tokens=30, ignore_eos=True)
    run(job)
    text = free[0, 0][0].text
    words = text.split()
    stop = f"{words[4]} {words[5]}"
    for stream in (False, True):
        job, parts = generation(
            1, prompt, seed=4, max_new_tokens=30, ignore_eos=True, stop=(stop,), stream_tokens=stream
        )
        run(job)
        assert parts[0, 0][-1].finish_reason is FinishReason.STOP_STRING
        assert "".join(part.text for part in parts[0, 0]) == text[: text.index(stop)]
        sent = [t for part in parts[0, 0] for t in part.tokens]
        assert stop in engine.text.decode(sent)


def test_values_and_entropy_have_their_meaning(run: Run) -> None:
    tokens = texts(1)[0]
    result = run(ScoreJob(rows=[row(1, tokens)])).rows[0]
    every = [
        run(ScoreJob(rows=[ScoreRow(1, np.append(tokens[:5], v), 5, logprobs=True)])).rows[0].logprobs[0]
        for v in range(120)
    ]
    probabilities = np.exp(np.float64(every[: engine_vocabulary(run)]))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-4)
    assert result.entropy[2] == pytest.approx(-(probabilities * np.log(probabilities)).sum(), rel=1e-4)


def engine_vocabulary(run: Run) -> int:
    from engine.conftest import BASE as path
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path).vocab_size)
