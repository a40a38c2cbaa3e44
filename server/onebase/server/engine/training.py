"""Training passes: forward and backward over rows of several policies, gradients kept apart.

A pass is one ForwardBackward. It may take several engine steps (micro-batches); its gradients stay in the pass until
its end and only then join the adapter's pending ones, so a pass that fails or is cancelled leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from onebase.server import failpoints
from onebase.server.engine.adapters import Adapter
from onebase.server.engine.batch import Row
from onebase.server.engine.heads import linear_head, token_logprobs
from onebase.server.engine.losses import LOSSES, Now, Then
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import Floats, ForwardBackwardJob, ForwardBackwardResult, PpoLoss, TrainRow

if TYPE_CHECKING:
    from onebase.server.engine.engine import Engine


Said = tuple[list[Floats], list[Floats], list[Floats]]
"""Logprobs, entropies and values on the host, an array per row."""


@dataclass(eq=False)
class Pass:
    """One ForwardBackward under way."""

    job: ForwardBackwardJob
    adapter: Adapter
    denominator: float
    version: int
    done: int = 0  # rows that were run
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    logprobs: list[Floats] = field(default_factory=list)
    entropies: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)

    def keep(self, gradients: Mapping[str, torch.Tensor], said: Said) -> None:
        """Takes in what a micro-batch gave, all of it: this takes no memory, so it cannot fail half-way."""
        for name, gradient in gradients.items():
            if name in self.gradients:
                self.gradients[name].add_(gradient)
            else:
                self.gradients[name] = gradient
        for store, rows in zip((self.logprobs, self.entropies, self.values), said, strict=True):
            store.extend(rows)
        self.done += len(said[0])


def begin(adapter: Adapter, job: ForwardBackwardJob) -> Pass:
    """A pass before its first row.

    Raises:
        Aborted: the adapter has another version than the one expected.
        FailedPrecondition: a loss of values, and no value head; or pending gradients were lost.
    """
    adapter.check_version(job.expected_version)
    adapter.check_pending(job.expected_pending)
    if job.needs_values:
        adapter.require_value_head()
    return Pass(job, adapter, job.denominator or job.count, adapter.weights.version)


def run(engine: Engine, parts: Sequence[tuple[Pass, int]]) -> None:
    """One step: the next rows of one or several passes (of different adapters), forward and backward.

    Args:
        engine: the engine.
        parts: passes, each with how many of its remaining rows to run.
    """
    work = [(task, task.job.rows[task.done : task.done + count]) for task, count in parts]
    rows = [[Row(task.adapter.weights, row.tokens[:-1].tolist()) for row in train] for task, train in work]
    with torch.enable_grad(), engine.showing([row for of_task in rows for row in of_task]) as batch:
        hidden = engine.run(batch)
        said = [_say(engine, task, train, of_task, hidden) for (task, train), of_task in zip(work, rows, strict=True)]
        losses = [_loss(task, train, now) for (task, train), now in zip(work, said, strict=True)]
        parameters = [task.adapter.weights.parameters() for task, _ in work]
        flat = [p for named in parameters for p in named.values()]
        found = iter(torch.autograd.grad(torch.stack(losses).sum(), flat, materialize_grads=True))
    told = [_on_host(train, now) for (_, train), now in zip(work, said, strict=True)]
    gradients = [{name: next(found) for name in named} for named in parameters]
    failpoints.hit("train")
    for (task, _), of_task, numbers in zip(work, gradients, told, strict=True):
        task.keep(of_task, numbers)


def _on_host(train: Sequence[TrainRow], now: Now) -> Said:
    """What the weights said about rows."""
    cuts = np.cumsum([len(row.tokens) - row.start for row in train])[:-1]
    logprobs, entropies, values = (
        list(np.split(numbers.detach().cpu().numpy(), cuts)) for numbers in (now.logprobs, now.entropy, now.values)
    )
    return logprobs, entropies, values


def _say(engine: Engine, task: Pass, train: Sequence[TrainRow], rows: Sequence[Row], hidden: torch.Tensor) -> Now:
    """What the pass's weights say about the completion tokens of these rows."""
    device = hidden.device
    index = torch.cat([torch.arange(r.start + t.start - 1, r.stop) for r, t in zip(rows, train, strict=True)])
    states = hidden[index.to(device)]
    head = task.adapter.weights.value_head
    none = torch.zeros(len(states), device=device)
    values = none if head is None else linear_head(head, states)[:, 0].float()
    if not task.job.needs_logprobs:
        return Now(none, none, values)
    targets = torch.from_numpy(np.concatenate([t.tokens[t.start :] for t in train])).to(device)
    logprobs, entropy = token_logprobs(
        engine.head, states, targets, entropy=True, entropy_gradient=task.job.needs_entropy_gradient
    )
    return Now(logprobs, none if entropy is None else entropy, values)


def _loss(task: Pass, train: Sequence[TrainRow], now: Now) -> torch.Tensor:
    """The pass's share of its loss for these rows."""
    settings = task.job.loss
    sums = LOSSES[type(settings)].sums(now, Then.of(train, now.logprobs.device), settings)
    return sums["loss/total"] / task.denominator


def finish(task: Pass) -> ForwardBackwardResult:
    """Adds the pass's gradients to the adapter's pending ones and says what it saw.

    Raises:
        FailedPrecondition: the loss or a gradient is not finite; the pending gradients stay as they were.
    """
    metrics = _metrics(task)
    fine = all(bool(torch.isfinite(gradient).all()) for gradient in task.gradients.values())
    if not (fine and np.isfinite(metrics["loss/total"])):
        raise FailedPrecondition(
            "NONFINITE_LOSS",
            f"the loss of adapter {task.adapter.name!r} is {metrics['loss/total']} or a gradient is not finite: "
            "nothing was added to the pending gradients; look at the arrays that were sent with the sequences",
        )
    settings = task.job.loss
    exceeded = isinstance(settings, PpoLoss) and metrics["policy/ratio"] > settings.ratio_threshold
    if exceeded:
        for gradient in task.gradients.values():
            gradient.zero_()
        metrics.update({name: 0.0 for name in metrics if name.startswith("loss/")})
    task.adapter.add_gradients(task.gradients)
    logits, head = task.job.needs_logprobs, task.adapter.weights.value_head is not None
    return ForwardBackwardResult(
        version=task.version,
        metrics=metrics,
        logprobs=tuple(task.logprobs) if logits else (),
        entropy=tuple(task.entropies) if logits else (),
        values=tuple(task.values) if head else (),
        ratio_threshold_exceeded=exceeded,
        facts=task.adapter.facts(),
    )


def _metrics(task: Pass) -> dict[str, float]:
    """The whole pass's losses, divided by its denominator, and its statistics."""
    now = Now(*(torch.from_numpy(np.concatenate(a)) for a in (task.logprobs, task.entropies, task.values)))
    then, settings = Then.of(task.job.rows, torch.device("cpu")), task.job.loss
    loss = LOSSES[type(settings)]
    found = {name: total / task.denominator for name, total in loss.sums(now, then, settings).items()}
    found |= loss.statistics(now, then, settings)
    return {name: float(number) for name, number in found.items()}
