"""A version's numbers never change; gradients join whole or not at all."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from engine.conftest import BASE, Run, generation, perturb, texts
from engine.test_mixed import row, train_rows

from onebase.server.config import EngineConfig, Limits
from onebase.server.engine import Engine, open_engine, training
from onebase.server.errors import Aborted, FailedPrecondition
from onebase.server.jobs import (
    AdamW,
    CompletionChunk,
    CreateAdapterJob,
    ForwardBackwardJob,
    Job,
    LoraSpec,
    OptimStepJob,
    PpoLoss,
    ScoreJob,
)
from onebase.server.worker import Worker


def test_each_step_makes_the_next_version(run: Run) -> None:
    for version in (1, 2, 3):
        run(ForwardBackwardJob(adapter=1, rows=train_rows(version), loss=PpoLoss()))
        result = run(OptimStepJob(adapter=1, adamw=AdamW(1e-3)))
        assert result.version == version
        assert result.gradients_applied == 1
        assert run(ScoreJob(rows=[row(1, texts(1)[0])])).versions == {1: version}


def test_a_completion_is_made_by_one_version_though_the_policy_is_stepped_meanwhile(
    worker: Worker, engine: Engine, run: Run
) -> None:
    prompt = texts(1)[0][:4]
    job, alone = generation(1, [prompt], seed=1, max_new_tokens=60, ignore_eos=True)
    run(job)

    begun = threading.Event()
    job, chunks = generation(1, [prompt], seed=1, max_new_tokens=60, ignore_eos=True, stream_tokens=True)
    emit = job.emit

    def slowly(chunk: CompletionChunk) -> None:
        emit(chunk)
        begun.set()
        threading.Event().wait(0.002)

    job.emit = slowly
    worker.submit(job)
    assert begun.wait(30)
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    assert run(OptimStepJob(adapter=1, adamw=AdamW(0.5))).version == 1
    assert not job.done.done(), "the step came too late to show anything"
    assert engine.adapters[1].facts().memory.old_versions > 0
    job.done.result(60)
    parts = chunks[0, 0]
    assert {part.version for part in parts} == {0}
    assert tuple(t for part in parts for t in part.tokens) == alone[0, 0][0].tokens
    assert engine.adapters[1].facts().memory.old_versions == 0
    job, after = generation(1, [prompt], seed=1, max_new_tokens=60, ignore_eos=True)
    run(job)
    assert after[0, 0][0].version == 1
    assert after[0, 0][0].tokens != alone[0, 0][0].tokens


def test_an_old_or_future_version_is_refused(run: Run) -> None:
    job = ScoreJob(rows=[row(1, texts(1)[0])], versions={1: 7})
    with pytest.raises(Aborted, match="version 0, not 7"):
        run(job)
    with pytest.raises(Aborted):
        run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss(), expected_version=7))
    with pytest.raises(Aborted):
        run(OptimStepJob(adapter=1, adamw=AdamW(1e-3), expected_version=7))


def test_a_step_without_gradients_is_refused(run: Run) -> None:
    with pytest.raises(FailedPrecondition, match="ForwardBackward"):
        run(OptimStepJob(adapter=1, adamw=AdamW(1e-3)))


def test_two_half_passes_add_up_to_the_whole(engine: Engine, run: Run) -> None:
    rows = train_rows(1, count=8)
    count = float(sum(row.mask.sum() for row in rows))
    run(ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss()))
    whole = {name: g.clone() for name, g in engine.adapters[1].gradients.items()}
    engine.adapters[1].gradients, engine.adapters[1].pending = {}, 0
    for half in (rows[:4], rows[4:]):
        run(ForwardBackwardJob(adapter=1, rows=half, loss=PpoLoss(), denominator=count))
    assert engine.adapters[1].pending == 2
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, gradient in engine.adapters[1].gradients.items():
        np.testing.assert_allclose(gradient.numpy(), whole[name].numpy(), rtol=0, atol=1e-5 * largest)


def test_masked_tokens_do_not_count(engine: Engine, run: Run) -> None:
    def gradients(poison: float) -> dict[str, np.ndarray]:
        rows = train_rows(1)
        for one in rows:
            one.mask[-2:] = False
            one.advantages[-2:] = poison
            one.returns[-2:] = poison
        run(ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss()))
        found = {name: g.numpy().copy() for name, g in engine.adapters[1].gradients.items()}
        engine.adapters[1].gradients, engine.adapters[1].pending = {}, 0
        return found

    one, other = gradients(0.0), gradients(1000.0)
    for name, gradient in one.items():
        np.testing.assert_array_equal(gradient, other[name])


def test_a_batch_over_the_ratio_threshold_adds_zero_gradients(engine: Engine, run: Run) -> None:
    rows = train_rows(1)
    for one in rows:
        one.old_logprobs[:] = -20.0
    result = run(ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss(ratio_threshold=10.0)))
    assert result.ratio_threshold_exceeded
    assert result.metrics["policy/ratio"] > 10
    assert result.metrics["loss/total"] == 0
    assert all(not g.any() for g in engine.adapters[1].gradients.values())
    assert engine.adapters[1].pending == 1


def test_an_adapter_begins_at_the_version_that_it_is_told_whatever_it_is_a_copy_of(engine: Engine, run: Run) -> None:
    assert (
        run(CreateAdapterJob(uid=8, name="new", lora=LoraSpec(rank=2), value_head=True, least_version=5)).version == 5
    )
    copied = CreateAdapterJob(uid=9, name="copy", lora=LoraSpec(), value_head=True, init_from=8, least_version=3)
    assert run(copied).version == 3
    run(ForwardBackwardJob(adapter=9, rows=train_rows(1), loss=PpoLoss()))
    assert run(OptimStepJob(adapter=9, adamw=AdamW(1e-3))).version == 4


def test_a_gradient_that_is_not_finite_skips_the_step_and_leaves_the_weights(engine: Engine, run: Run) -> None:
    adapter = engine.adapters[1]
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    next(iter(adapter.gradients.values())).fill_(float("nan"))
    before = {name: p.detach().clone() for name, p in adapter.weights.parameters().items()}
    with pytest.raises(FailedPrecondition, match="no step was made"):
        run(OptimStepJob(adapter=1, adamw=AdamW(1e-3, weight_decay=0.5)))
    assert adapter.weights.version == 0
    assert adapter.moments is None
    for name, parameter in adapter.weights.parameters().items():
        np.testing.assert_array_equal(before[name].numpy(), parameter.detach().numpy())


def test_clip_norm_scales_the_whole_gradient_of_this_policy(run: Run) -> None:
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    free = run(OptimStepJob(adapter=1, adamw=AdamW(0.0))).grad_norm
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    assert run(OptimStepJob(adapter=1, adamw=AdamW(0.0), max_grad_norm=free / 10)).grad_norm == pytest.approx(free)


def test_a_version_in_the_window_can_still_be_read(engine: Engine) -> None:
    engine.version_window = 2
    worker = Worker(engine, Limits())
    worker.start()

    def run(job: Job[Any]) -> Any:
        worker.submit(job)
        return job.done.result(30)

    run(CreateAdapterJob(uid=1, name="p", lora=LoraSpec(rank=4), value_head=True))
    perturb(engine, 1)
    tokens, seen = texts(1)[0], []
    for version in range(4):
        seen.append(run(ScoreJob(rows=[row(1, tokens)])).rows[0].logprobs)
        run(ForwardBackwardJob(adapter=1, rows=train_rows(version), loss=PpoLoss()))
        run(OptimStepJob(adapter=1, adamw=AdamW(1e-2)))
    for version in (2, 3):
        result = run(ScoreJob(rows=[row(1, tokens)], versions={1: version}))
        assert result.versions == {1: version}
        np.testing.assert_array_equal(result.rows[0].logprobs, seen[version])
    for version in (1, 5):
        with pytest.raises(Aborted, match=f"version 4, not {version}"):
            run(ScoreJob(rows=[row(1, tokens)], versions={1: version}))
    assert len(engine.adapters[1].old) == 2
    worker.stop(0.0)


@pytest.mark.parametrize("count", [6, 60])
def test_gradients_with_checkpointed_layers_are_the_same(count: int) -> None:
    found = []
    for checkpointing in (False, True):
        engine = open_engine(EngineConfig(model=str(BASE), threads=1, gradient_checkpointing=checkpointing))
        job = CreateAdapterJob(uid=1, name="p", lora=LoraSpec(rank=4), value_head=True)
        engine.add(engine.formats.create(job))
        perturb(engine, 1)
        task = engine.begin_pass(ForwardBackwardJob(adapter=1, rows=train_rows(1, count), loss=PpoLoss()))
        training.run(engine, [(task, count)])
        found.append((task.gradients, training.finish(task).metrics))
    assert found[0][1] == found[1][1]
    for name, gradient in found[0][0].items():
        np.testing.assert_array_equal(gradient.numpy(), found[1][0][name].numpy(), err_msg=name)
