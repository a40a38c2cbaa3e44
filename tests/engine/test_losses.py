"""Every loss in the engine: alone and shared, whole and in parts, and what it may not depend on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.conftest import BASE, POLICIES, Run, perturb, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, open_engine, training
from onebase.server.engine.heads import CHUNK, LmHead, token_logprobs
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import (
    CreateAdapterJob,
    CrossEntropyLoss,
    CustomLoss,
    DpoLoss,
    ForwardBackwardJob,
    ImportanceSamplingLoss,
    LoraSpec,
    Loss,
    PpoLoss,
    TrainRow,
    ValueLoss,
)
from onebase.server.tasks import PassTask, micro_batches
from onebase.server.worker import Worker

LOSSES: list[Loss] = [
    PpoLoss(),
    PpoLoss(cliprange_high=0.4, kl_coef=0.3, entropy_coef=0.2),
    ImportanceSamplingLoss(),
    CrossEntropyLoss(),
    DpoLoss(beta=0.5, label_smoothing=0.1),
    CustomLoss(),
    ValueLoss(),
]
Gradients = dict[str, np.ndarray]


def rows_of(seed: int, count: int = 6, start: int = 3) -> list[TrainRow]:
    """Rows with every array, near enough to the policy that no ratio or exponential is extreme."""
    random = np.random.default_rng(seed)
    rows = []
    for tokens in texts(count, seed):

        def numbers(mean: float, deviation: float, length: int = len(tokens) - start) -> np.ndarray:
            return random.normal(mean, deviation, length).astype(np.float32)

        mask = random.random(len(tokens) - start) < 0.8
        mask[0] = True
        rows.append(
            TrainRow(
                tokens, start, numbers(-4.6, 0.1), numbers(0, 1), numbers(0, 1), numbers(0, 1), mask,
                reference_logprobs=numbers(-4.6, 0.1), weights=numbers(1, 0.2), logprob_gradients=numbers(0, 1),
                value_gradients=numbers(0, 1), entropy_gradients=numbers(0, 1),
            )
        )  # fmt: skip
    return rows


def taken(engine: Engine, uid: int) -> Gradients:
    """The pending gradients, which are then dropped."""
    adapter = engine.adapters[uid]
    found = {name: gradient.numpy().copy() for name, gradient in adapter.gradients.items()}
    adapter.drop_gradients()
    return found


def assert_near(found: Gradients, wanted: Gradients) -> None:
    """To 1e-5 of the largest of all."""
    largest = max(float(np.abs(gradient).max()) for gradient in wanted.values())
    assert largest > 0
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-5 * largest, err_msg=name)


def passed(engine: Engine, job: ForwardBackwardJob, train_tokens: int) -> tuple[Gradients, dict[str, float]]:
    """A pass without a worker, in micro-batches of so many tokens: its gradients and metrics."""
    task = PassTask(job, train_tokens)
    task.begin(engine)
    assert task.state is not None
    while task.next_cost():
        training.run(engine, [(task.state, task.next_rows())])
        task.ran()
    metrics = dict(training.finish(task.state).metrics)
    return taken(engine, job.adapter), metrics


@pytest.fixture(scope="module")
def lone() -> Engine:
    """An engine with one policy, which tests leave without gradients."""
    engine = open_engine(EngineConfig(model=str(BASE), threads=1))
    engine.add(engine.formats.create(CreateAdapterJob(uid=1, name="p", lora=LoraSpec(rank=4), value_head=True)))
    perturb(engine, 1)
    return engine


@pytest.mark.parametrize("first", range(len(LOSSES)))
def test_passes_of_several_losses_share_steps_bit_for_bit(worker: Worker, engine: Engine, run: Run, first: int) -> None:
    losses = [LOSSES[(first + i) % len(LOSSES)] for i in range(len(POLICIES))]
    jobs = [
        ForwardBackwardJob(adapter=uid, rows=rows_of(uid, 20), loss=loss)
        for uid, loss in zip(POLICIES, losses, strict=True)
    ]
    for job in jobs:
        worker.submit(job)
    together = [job.done.result(60) for job in jobs]
    shared = {uid: taken(engine, uid) for uid in POLICIES}
    for job, mixed in zip(jobs, together, strict=True):
        alone = run(ForwardBackwardJob(adapter=job.adapter, rows=job.rows, loss=job.loss))
        assert alone.metrics == mixed.metrics
        for name, gradient in taken(engine, job.adapter).items():
            np.testing.assert_array_equal(gradient, shared[job.adapter][name])
        assert any(np.abs(gradient).max() > 0 for gradient in shared[job.adapter].values())


@settings(max_examples=25, deadline=None)
@given(data=st.data(), loss=st.sampled_from(LOSSES), seed=st.integers(0, 5), train_tokens=st.sampled_from([1, 40, 999]))
def test_a_batch_in_several_passes_is_one_pass(
    lone: Engine, data: st.DataObject, loss: Loss, seed: int, train_tokens: int
) -> None:
    rows = rows_of(seed)
    whole = ForwardBackwardJob(adapter=1, rows=rows, loss=loss)
    step = whole.rows_per_term
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) // step - 1)), label="cuts"))
    bounds = [0, *(cut * step for cut in cuts), len(rows)]
    wanted, metrics = passed(lone, whole, 999)

    totals, added = [], {name: np.zeros_like(gradient) for name, gradient in wanted.items()}
    for start, stop in itertools.pairwise(bounds):
        part = replace_rows(whole, rows[start:stop])
        gradients, found = passed(lone, part, train_tokens)
        totals.append(found["loss/total"])
        added = {name: added[name] + gradient for name, gradient in gradients.items()}

    assert_near(added, wanted)
    assert sum(totals) == pytest.approx(metrics["loss/total"], rel=1e-4, abs=1e-5)


def replace_rows(job: ForwardBackwardJob, rows: Sequence[TrainRow]) -> ForwardBackwardJob:
    """The same loss with the same denominator over other rows."""
    return ForwardBackwardJob(adapter=job.adapter, rows=rows, loss=job.loss, denominator=job.count)


@given(
    costs=st.lists(st.integers(1, 50), max_size=20).map(lambda costs: costs[: len(costs) // 2 * 2]),
    most=st.integers(1, 120),
    together=st.sampled_from([1, 2]),
)
def test_micro_batches_cut_between_groups_only(costs: list[int], most: int, together: int) -> None:
    batches = micro_batches(costs, most, together)
    assert sum(rows for rows, _ in batches) == len(costs)
    start = 0
    for rows, tokens in batches:
        assert rows % together == 0
        assert tokens == sum(costs[start : start + rows])
        assert tokens <= most or rows == together
        start += rows


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_what_is_masked_does_not_count_however_extreme(lone: Engine, loss: Loss) -> None:
    def gradients(poison: float) -> Gradients:
        rows = []
        for row in rows_of(1):
            hidden = ~row.mask
            assert hidden.any() or len(row.mask) < 8
            arrays = {
                name: np.where(hidden, np.float32(poison), getattr(row, name))
                for name in ("old_logprobs", "advantages", "returns", "reference_logprobs", "weights",
                             "logprob_gradients", "value_gradients", "entropy_gradients")
            }  # fmt: skip
            rows.append(replace(row, **arrays))
        return passed(lone, ForwardBackwardJob(adapter=1, rows=rows, loss=loss), 999)[0]

    one, other = gradients(0.0), gradients(-500.0)
    for name, gradient in one.items():
        np.testing.assert_array_equal(gradient, other[name], err_msg=name)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_twice_the_weight_is_twice_the_gradient(lone: Engine, loss: Loss) -> None:
    rows = [replace(row, weights=None) for row in rows_of(2)]
    twice = [replace(row, weights=np.full(len(row.mask), 2, np.float32)) for row in rows]
    one, metrics = passed(lone, ForwardBackwardJob(adapter=1, rows=rows, loss=loss), 999)
    other, doubled = passed(lone, ForwardBackwardJob(adapter=1, rows=twice, loss=loss), 999)
    if isinstance(loss, DpoLoss):  # weights stand inside its sigmoid
        assert doubled["logps/chosen"] == pytest.approx(2 * metrics["logps/chosen"])
        assert doubled["rewards/margins"] == pytest.approx(2 * metrics["rewards/margins"])
    else:
        assert doubled["loss/total"] == pytest.approx(2 * metrics["loss/total"])
        assert_near(other, {name: 2 * gradient for name, gradient in one.items()})
    statistics = {name for name in metrics if name.startswith(("policy/", "val/", "returns/"))}
    assert all(doubled[name] == metrics[name] for name in statistics)


def test_the_default_denominators(lone: Engine) -> None:
    rows = rows_of(3)
    tokens = sum(int(row.mask.sum()) for row in rows)
    counts = {type(loss): ForwardBackwardJob(adapter=1, rows=rows, loss=loss).count for loss in LOSSES}
    expected: dict[type, float] = dict.fromkeys(map(type, LOSSES), tokens)
    assert counts == {**expected, DpoLoss: 3, CustomLoss: 1}


def test_a_policy_without_a_value_head_takes_every_loss_without_values(
    engine: Engine, run: Run, worker: Worker
) -> None:
    run(CreateAdapterJob(uid=9, name="headless", lora=LoraSpec(rank=4), value_head=False))
    perturb(engine, 9)
    rows = rows_of(1)
    for loss in (PpoLoss(), ValueLoss(), CustomLoss()):
        with pytest.raises(FailedPrecondition, match="no value head"):
            run(ForwardBackwardJob(adapter=9, rows=rows, loss=loss))
    without = [replace(row, value_gradients=None) for row in rows]
    for loss in (PpoLoss(vf_coef=0.0), ImportanceSamplingLoss(), CrossEntropyLoss(), DpoLoss(), CustomLoss()):
        result = run(ForwardBackwardJob(adapter=9, rows=without, loss=loss))
        assert result.values == ()
        assert [len(one) for one in result.entropy] == [len(row.mask) for row in rows]
        assert all(np.all((one > 0) & (one < np.log(128))) for one in result.entropy)


def test_a_custom_loss_that_is_not_finite_leaves_nothing(engine: Engine, run: Run) -> None:
    rows = [replace(row, logprob_gradients=row.logprob_gradients * np.float32(np.inf)) for row in rows_of(1)]
    with pytest.raises(FailedPrecondition, match="not finite"):
        run(ForwardBackwardJob(adapter=1, rows=rows, loss=CustomLoss()))
    assert not engine.adapters[1].gradients
    assert engine.adapters[1].pending == 0


def test_derivatives_of_logprobs_and_entropies_are_autograds() -> None:
    """Of logits that go through a bias and a soft cap, over more than one chunk."""
    random = torch.Generator().manual_seed(0)
    embedding = torch.nn.Linear(16, 50)
    head = LmHead(embedding, lambda logits: torch.tanh(logits / 3) * 3)
    count = CHUNK + 7
    targets = torch.randint(0, 50, (count,), generator=random)
    by_logprob, by_entropy = torch.randn(2, count, generator=random)
    start = torch.randn(count, 16, generator=random)

    states = start.clone().requires_grad_()
    distribution = torch.distributions.Categorical(logits=head.finish(embedding(states)))
    wanted_logprobs, wanted_entropy = distribution.log_prob(targets), distribution.entropy()
    (wanted,) = torch.autograd.grad(
        [wanted_logprobs, wanted_entropy], states, [by_logprob, by_entropy], retain_graph=True
    )
    (wanted_alone,) = torch.autograd.grad(wanted_logprobs, states, by_logprob)

    states = start.clone().requires_grad_()
    logprobs, entropy = token_logprobs(head, states, targets, entropy=True, entropy_gradient=True)
    assert entropy is not None
    (found,) = torch.autograd.grad([logprobs, entropy], states, [by_logprob, by_entropy])
    torch.testing.assert_close(logprobs, wanted_logprobs)
    torch.testing.assert_close(entropy, wanted_entropy)
    torch.testing.assert_close(found, wanted)

    logprobs, entropy = token_logprobs(head, states, targets, entropy=True)
    assert entropy is not None
    assert not entropy.requires_grad
    (found,) = torch.autograd.grad(logprobs, states, by_logprob)
    torch.testing.assert_close(found, wanted_alone)
