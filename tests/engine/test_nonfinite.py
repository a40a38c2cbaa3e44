"""Numbers that are not finite stay with the adapter that made them: in the cache, in a step, in a draw, in a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine.conftest import Run, generation, texts
from engine.test_memory import bits
from engine.test_mixed import row, train_rows
from engine.test_worker import block

from onebase.server.completions import GenerateTask
from onebase.server.config import Budget, Limits
from onebase.server.engine import Engine, optimizer, overflow
from onebase.server.engine.kv import KVCache
from onebase.server.engine.sampling import draw
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import (
    BASE,
    AdamW,
    CrossEntropyLoss,
    ForwardBackwardJob,
    Job,
    OptimStepJob,
    Sampling,
    ScoreJob,
)
from onebase.server.worker import Worker

INF, NAN = float("inf"), float("nan")
BROKEN = [("lora_A", 3e38), ("lora_A", INF), ("lora_B", 1e25), ("lora_B", NAN)]
"""Finite numbers whose products are not, and others."""
VICTIMS = (BASE, 2, 3)


def poison(engine: Engine, uid: int, part: str, value: float) -> None:
    """Fills an adapter's A or B, as a new version."""
    weights = engine.adapters[uid].weights
    with torch.no_grad():
        for name, parameter in weights.parameters().items():
            if part in name:
                parameter.fill_(value)
    for pair in weights.lora.values():
        pair.refresh()
    weights.version += 1


def asked(uid: int, length: int, temperature: float, n: int = 2) -> tuple[Job[Any], dict[Any, Any]]:
    return generation(uid, texts(1, shortest=length, longest=length + 1), n=n, temperature=temperature, seed=1)


def drawn(job: Job[Any], chunks: dict[Any, Any]) -> Any:
    """Tokens and logprobs of a job on its way; or the reason why there are none."""
    error = job.done.exception(60)
    if error is not None:
        return getattr(error, "reason", repr(error))
    return {place: [(chunk.tokens, chunk.logprobs) for chunk in parts] for place, parts in chunks.items()}


def generated(worker: Worker, *which: Any) -> Any:
    job, chunks = asked(*which)
    worker.submit(job)
    return drawn(job, chunks)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("part", "value"), BROKEN)
def test_who_takes_the_slots_of_a_broken_adapter_gets_what_it_gets_alone(
    engine: Engine, worker: Worker, part: str, value: float, temperature: float
) -> None:
    wanted = [generated(worker, uid, 4, temperature) for uid in VICTIMS]
    poison(engine, 1, part, value)
    assert generated(worker, 1, 60, temperature, 8) == "NONFINITE_LOGITS"
    assert [generated(worker, uid, 4, temperature) for uid in VICTIMS] == wanted
    assert engine.kv.used == 0


def test_a_slot_is_taken_without_what_it_held_but_for_what_is_shared() -> None:
    kv = KVCache(4, 64)
    slots = [kv.take() for _ in range(4)]
    for slot in slots:
        kv.write(0, slot, 0, torch.full((2, 32, 4), INF), torch.full((2, 32, 4), NAN))
    tokens = list(range(32))
    kv.give_back(slots[1], "key", tokens)
    kv.give_back(slots[2])
    source, shared = kv.shared("key", tokens[:20])
    taken = [kv.take(source, shared), kv.take(source, shared)]
    assert (source, shared, taken) == (slots[1], 20, [slots[1], slots[2]])
    for t in kv.layer(0):
        assert not t[slots[2]].any()
        assert not t[slots[1], :, 20:].any()
        assert not torch.isfinite(t[slots[1], :, :20]).any()


@pytest.mark.parametrize("step_tokens", [16, 256])
def test_free_slots_hold_nothing_beyond_what_the_cache_knows_of(engine: Engine, step_tokens: int) -> None:
    worker = Worker(engine, Limits(), Budget(step_tokens, step_tokens))
    worker.start()
    try:
        for length, n in ((60, 5), (7, 3), (33, 8), (5, 1)):
            job, _ = generation(BASE, texts(2, shortest=length, longest=length + 1), n=n, max_new_tokens=30)
            worker.submit(job)
            job.done.result(60)
    finally:
        worker.stop(0.0)
    taken = [engine.kv.take() for _ in range(8)]
    for layer in range(2):
        for t in engine.kv.layer(layer):
            assert t.shape[0] == len(taken)
            assert not t.any()


def test_slots_are_given_back_when_what_is_shared_cannot_be_copied(
    engine: Engine, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(engine.kv, "copy", copy)
    monkeypatch.setattr(engine.kv, "shared", lambda key, tokens: (7, 20))
    job, _ = generation(1, texts(1, shortest=40, longest=41), n=3)
    task = GenerateTask(job, lambda: 256)
    task.begin(engine)
    with pytest.raises(ValueError, match="a bug"):
        task.take(engine)
    task.release(engine)
    assert engine.kv.used == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("part", "value"), BROKEN)
def test_a_row_beside_a_broken_adapter_gets_what_it_gets_alone(
    engine: Engine, worker: Worker, run: Run, part: str, value: float, temperature: float
) -> None:
    short = texts(1)[0][:9]
    scored = run(ScoreJob(rows=[row(2, short)])).rows[0]
    wanted = [generated(worker, uid, 6, temperature) for uid in VICTIMS]
    go = block(worker)
    poison(engine, 1, part, value)
    bad, good = ScoreJob(rows=[row(1, short)]), ScoreJob(rows=[row(2, short)])
    asking = [asked(uid, 6, temperature) for uid in (*VICTIMS, 1)]
    for job in (bad, good, *(job for job, _ in asking)):
        worker.submit(job)
    go.set()
    found = good.done.result(60).rows[0]
    assert found.logprobs.tobytes() == scored.logprobs.tobytes()
    assert found.values.tobytes() == scored.values.tobytes()
    assert not np.isfinite(bad.done.result(60).rows[0].logprobs).all()
    assert [drawn(*one) for one in asking] == [*wanted, "NONFINITE_LOGITS"]


def test_a_pass_beside_a_broken_adapter_has_the_gradients_that_it_has_alone(
    engine: Engine, worker: Worker, run: Run
) -> None:
    def passes(uid: int) -> ForwardBackwardJob:
        return ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=CrossEntropyLoss())

    run(passes(2))
    wanted = bits(engine, 2)
    engine.adapters[2].drop_gradients()
    go = block(worker)
    poison(engine, 1, "lora_B", NAN)
    jobs = [passes(1), passes(2)]
    for job in jobs:
        worker.submit(job)
    go.set()
    assert getattr(jobs[0].done.exception(60), "reason", None) == "NONFINITE_LOSS"
    jobs[1].done.result(60)
    assert bits(engine, 2) == wanted


# ------------------------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.0}])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_gives_a_token_of_the_vocabulary_and_leaves_the_others_theirs(
    value: float, sampling: dict[str, Any]
) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    wanted = draw(logits, [Sampling(8, **sampling)] * 3, [(i, 0, 0) for i in range(3)])
    logits[1] = value
    found = draw(logits, [Sampling(8, **sampling)] * 3, [(i, 0, 0) for i in range(3)])
    assert found[::2] == wanted[::2]
    assert 0 <= found[1] < 50


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_every_token_is_banned_none_comes(engine: Engine, worker: Worker, temperature: float) -> None:
    everything = tuple(range(engine.facts.vocab_size))
    job, chunks = generation(
        2, texts(1), temperature=temperature, stop_token_ids=everything, min_new_tokens=4, max_new_tokens=8
    )
    worker.submit(job)
    assert drawn(job, chunks) == "NONFINITE_LOGITS"


# ------------------------------------------------------------------------------------------------- optimizer steps


def prepared(run: Run, engine: Engine) -> dict[str, bytes]:
    """A policy with moments and pending gradients: its bits."""
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=CrossEntropyLoss()))
    run(OptimStepJob(adapter=1, adamw=AdamW(1e-3)))
    run(ForwardBackwardJob(adapter=1, rows=train_rows(2), loss=CrossEntropyLoss()))
    return bits(engine, 1)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (AdamW(1e39), "adamw.learning_rate"),
        (AdamW(1e3, weight_decay=1e38), "adamw.weight_decay"),
        (AdamW(1e-3, beta1=0.0, beta2=0.0, eps=1e-300), "adamw.eps"),
    ],
)
@pytest.mark.parametrize("window", [0, 2])
def test_a_step_to_weights_that_are_not_finite_changes_no_bit_and_names_what_is_to_blame(
    engine: Engine, run: Run, settings: AdamW, field: str, window: int
) -> None:
    engine.adapters[1].window = window
    before = prepared(run, engine)
    if field == "adamw.eps":  # as of a parameter that no loss has reached yet
        next(iter(engine.adapters[1].gradients.values())).zero_()
        before = bits(engine, 1)
    with pytest.raises(FailedPrecondition, match=r"policy_1.*nothing was changed.*use a (smaller|larger)") as caught:
        run(OptimStepJob(adapter=1, adamw=settings))
    assert (caught.value.reason, caught.value.field) == ("NONFINITE_WEIGHTS", field)
    assert bits(engine, 1) == before
    assert run(OptimStepJob(adapter=1, adamw=AdamW(1e-3))).gradients_applied == 1
    assert all(bool(torch.isfinite(p).all()) for p in engine.adapters[1].weights.parameters().values())


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_a_step_that_is_large_and_finite_is_made_as_it_always_was(
    engine: Engine, run: Run, max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound cannot tell, so it is tried on copies first: to the same numbers, and leaving no trace."""
    prepared(run, engine)
    kept = engine.snapshot(1, with_optimizer=True)
    gradients = {name: g.clone() for name, g in engine.adapters[1].gradients.items()}
    settings = AdamW(1e-3, eps=1e-32)
    run(OptimStepJob(adapter=1, adamw=settings, max_grad_norm=max_grad_norm))
    wanted = bits(engine, 1)
    engine.release(kept.weights)
    again = engine.adapters[1]
    again.weights, again.moments, again.gradients, again.pending = kept.weights, kept.moments, gradients, 1
    monkeypatch.setattr(overflow, "refuse", lambda *_: None)
    again.step(settings, max_grad_norm)
    assert bits(engine, 1) == wanted


def test_an_ordinary_step_is_not_made_twice(engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(run, engine)
    made: list[object] = []
    step = optimizer.step

    def counted(*arguments: Any) -> None:
        made.append(arguments)
        step(*arguments)

    monkeypatch.setattr(optimizer, "step", counted)
    run(OptimStepJob(adapter=1, adamw=AdamW(1e3, weight_decay=0.1), max_grad_norm=1.0))
    assert len(made) == 1  # on the weights, and not before that on copies
    assert engine.adapters[1].weights.version == 2
