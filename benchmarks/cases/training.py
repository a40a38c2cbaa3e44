"""Training: four policies in one pass against one PEFT policy alone, and whose gradients are whose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from bench import Bench
from measure import Figure, exactly
from models import add_policy, open_ours, random_ids

from onebase.server.engine import Engine, training
from onebase.server.engine.losses import Now, Then, ppo
from onebase.server.jobs import Floats, ForwardBackwardJob, PpoLoss, TrainRow

TRAINEES, ROWS = 4, 4
"""Policies in a pass, and rows of each."""
PROMPT, LENGTH = 32, 96
RANKS = (4, 8, 16, 24)
"""Of the policies whose gradients are compared."""
NO_LOSS = PpoLoss(vf_coef=0.0)

Gradients = Mapping[str, torch.Tensor]


def four_over_one_adapter(bench: Bench) -> Figure:
    """One PEFT policy over four of ours in one pass, the same 16 × 96 tokens: forward and backward of PPO, 39M fp32."""
    ours, peft = bench.ours("39m", "float32"), bench.peft("39m", "float32")
    ids = random_ids(TRAINEES * ROWS, LENGTH)
    rows = train_rows(ids)
    then = Then.of(rows, torch.device("cpu"))
    peft.set_adapter("a1")
    model, value_head = peft.base_model.model, torch.nn.Linear(ours.engine.facts.hidden_size, 1)

    def theirs() -> None:
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
        logits = model.lm_head(states).float().flatten(0, 1)
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[:, PROMPT:].reshape(-1, 1))[:, 0]
        values = value_head(states)[..., 0].flatten()
        sums = ppo(Now(logprobs, torch.zeros_like(values), values), then, PpoLoss())
        torch.autograd.backward(sums["loss/total"] / then.mask.sum())
        peft.zero_grad(set_to_none=True)
        value_head.zero_grad(set_to_none=True)

    def mixed() -> None:
        backward(ours.engine, {uid: rows[(uid - 1) * ROWS : uid * ROWS] for uid in range(1, TRAINEES + 1)})

    return bench.pairs(theirs, mixed)


def cross_policy_gradient(bench: Bench) -> Figure:
    """The largest gradient that one policy's loss leaves in the three others of its pass: fp32 and bf16, 39M."""
    return _worst_of_dtypes(bench, _cross)


def mixed_against_solo_gradient(bench: Bench) -> Figure:
    """The largest difference of a policy's gradients in a pass of four from those alone: fp32 and bf16, 39M."""
    return _worst_of_dtypes(bench, _mixed_against_solo)


def backward(
    engine: Engine, rows: Mapping[int, Sequence[TrainRow]], losing: int | None = None
) -> Mapping[int, Gradients]:
    """One pass over the rows of each policy: their gradients, which are then dropped.

    Args:
        engine: holds the policies.
        rows: of each, by uid.
        losing: the only policy that has a loss; None if all have.
    """
    jobs = []
    for uid, of_one in rows.items():
        if losing in (None, uid):
            jobs.append(ForwardBackwardJob(adapter=uid, rows=of_one, loss=PpoLoss()))
        else:
            jobs.append(ForwardBackwardJob(adapter=uid, rows=[_quiet(row) for row in of_one], loss=NO_LOSS))
    passes = [engine.begin_pass(job) for job in jobs]
    training.run(engine, [(one, len(one.job.rows)) for one in passes])
    for one in passes:
        training.finish(one)
    found = {uid: dict(engine.adapter(uid).gradients) for uid in rows}
    for uid in rows:
        engine.adapter(uid).drop_gradients()
    return found


def train_rows(ids: torch.Tensor, prompt: int = PROMPT) -> list[TrainRow]:
    """Sequences [B, T] with random numbers of a rollout."""
    random = np.random.default_rng(0)
    count = ids.shape[1] - prompt

    def numbers(mean: float, deviation: float) -> Floats:
        return random.normal(mean, deviation, count).astype(np.float32)

    return [
        TrainRow(
            row.numpy(), prompt, numbers(-9, 0.1), numbers(0, 1), numbers(0, 1), numbers(0, 1), np.ones(count, bool)
        )
        for row in ids
    ]


def _worst_of_dtypes(bench: Bench, find: Callable[[Engine], tuple[float, float]]) -> Figure:
    """The larger figure of both precisions; `detail` has the smallest largest gradient, which must not be zero."""
    found = {dtype: find(bench.once(_four_ranks, dtype)) for dtype in ("float32", "bfloat16")}
    detail = {dtype: worst for dtype, (worst, _) in found.items()}
    detail["own_gradient_max_abs"] = min(own for _, own in found.values())
    return exactly(max(worst for worst, _ in found.values()), len(RANKS) * len(found), detail)


def _cross(engine: Engine) -> tuple[float, float]:
    """The largest gradient of policies without a loss, and the smallest of those with one."""
    rows = _mixed_rows()
    leaks: list[float] = []
    owns: list[float] = []
    for losing in rows:
        found = {uid: _largest(gradients) for uid, gradients in backward(engine, rows, losing).items()}
        owns.append(found.pop(losing))
        leaks += found.values()
    return max(leaks), min(owns)


def _mixed_against_solo(engine: Engine) -> tuple[float, float]:
    """The largest difference, and the smallest of the policies' largest gradients."""
    rows = _mixed_rows()
    mixed = backward(engine, rows)
    alone = {uid: backward(engine, {uid: of_one})[uid] for uid, of_one in rows.items()}
    differences = {uid: {name: mixed[uid][name] - g for name, g in alone[uid].items()} for uid in rows}
    return max(map(_largest, differences.values())), min(map(_largest, alone.values()))


def _largest(gradients: Gradients) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())


def _four_ranks(dtype: str) -> Engine:
    engine = open_ours("39m", dtype)
    for uid, rank in enumerate(RANKS, 1):
        add_policy(engine, uid, rank)
    return engine


def _mixed_rows() -> dict[int, list[TrainRow]]:
    """Rows of several lengths, as many as its uid for each policy."""
    return {uid: train_rows(random_ids(uid, LENGTH - 9 * uid, seed=uid)) for uid in range(1, len(RANKS) + 1)}


def _quiet(row: TrainRow) -> TrainRow:
    zeros = np.zeros_like(row.advantages)
    return TrainRow(row.tokens, row.start, row.old_logprobs, row.old_values, zeros, row.returns, row.mask)
