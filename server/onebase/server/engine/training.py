"""Training passes: forward and backward over rows of several policies, gradients kept apart.

A pass is one ForwardBackward. It may take several engine steps (micro-batches); its gradients stay in the pass until
its end and only then join the adapter's pending ones, so a pass that fails or is cancelled leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from onebase.server.engine.adapters import Adapter
from onebase.server.engine.batch import Row
from onebase.server.engine.engine import Engine, check_version, require_value_head
from onebase.server.engine.heads import linear_head, token_logprobs
from onebase.server.engine.losses import LOSSES, Now, Then, ppo_metrics
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import Floats, ForwardBackwardJob, ForwardBackwardResult, TrainRow


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


def begin(engine: Engine, job: ForwardBackwardJob) -> Pass:
    """Checks that the adapter can be trained as asked.

    Raises:
        NotFound, Aborted (another version), FailedPrecondition (a value loss without a value head).
    """
    adapter = engine.adapter(job.adapter)
    check_version(adapter, job.expected_version)
    if job.loss.vf_coef:
        require_value_head(adapter)
    counted = float(sum(int(row.mask.sum()) for row in job.rows))
    return Pass(job, adapter, job.denominator or counted, adapter.weights.version)


def run(engine: Engine, parts: Sequence[tuple[Pass, int]]) -> None:
    """One step: the next rows of one or several passes (of different adapters), forward and backward.

    Args:
        engine: the engine.
        parts: passes, each with how many of its remaining rows to run.
    """
    work = [(task, task.job.rows[task.done : task.done + count]) for task, count in parts]
    rows = [[Row(task.adapter.weights, row.tokens[:-1].tolist()) for row in train] for task, train in work]
    with torch.enable_grad():
        _, hidden = engine.forward([row for of_task in rows for row in of_task])
        losses = [
            _loss(engine, task, train, of_task, hidden) for (task, train), of_task in zip(work, rows, strict=True)
        ]
        parameters = [task.adapter.weights.parameters() for task, _ in work]
        flat = [p for named in parameters for p in named.values()]
        found = torch.autograd.grad(torch.stack(losses).sum(), flat, allow_unused=True)
    at = 0
    for (task, train), named in zip(work, parameters, strict=True):
        for name, parameter in named.items():
            gradient = found[at]
            at += 1
            if gradient is None:
                gradient = torch.zeros_like(parameter, requires_grad=False)
            if name in task.gradients:
                task.gradients[name].add_(gradient)
            else:
                task.gradients[name] = gradient
        task.done += len(train)


def _loss(
    engine: Engine, task: Pass, train: Sequence[TrainRow], rows: Sequence[Row], hidden: torch.Tensor
) -> torch.Tensor:
    """The pass's share of the loss for these rows; also notes what the weights say, for the answer."""
    device, settings = hidden.device, task.job.loss
    index = torch.cat([torch.arange(r.start + t.start - 1, r.stop) for r, t in zip(rows, train, strict=True)])
    states = hidden[index.to(device)]
    targets = torch.from_numpy(np.concatenate([t.tokens[t.start :] for t in train])).to(device)
    logprobs, entropy = token_logprobs(engine.head, states, targets, entropy=True)
    head = task.adapter.weights.value_head
    values = torch.zeros_like(logprobs) if head is None else linear_head(head, states)[:, 0].float()
    now = Now(logprobs, torch.zeros_like(logprobs) if entropy is None else entropy, values)
    policy, value = LOSSES[type(settings)](now, _then(train, device), settings)
    lengths = np.cumsum([len(t.tokens) - t.start for t in train])[:-1]
    for store, numbers in ((task.logprobs, logprobs), (task.entropies, now.entropy), (task.values, values)):
        store.extend(np.split(numbers.detach().cpu().numpy(), lengths))
    loss = policy if not settings.vf_coef else policy + settings.vf_coef * value
    return loss / task.denominator


def _then(train: Sequence[TrainRow], device: torch.device) -> Then:
    def flat(arrays: Sequence[Floats]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.float32)).to(device)

    return Then(
        logprobs=flat([t.old_logprobs for t in train]),
        values=flat([t.old_values for t in train]),
        advantages=flat([t.advantages for t in train]),
        returns=flat([t.returns for t in train]),
        mask=flat([t.mask.astype(np.float32) for t in train]),
    )


def finish(task: Pass) -> ForwardBackwardResult:
    """Adds the pass's gradients to the adapter's pending ones and says what it saw.

    Raises:
        FailedPrecondition: the loss or a gradient is not finite; the pending gradients stay as they were.
    """
    device = torch.device("cpu")
    now = Now(*(torch.from_numpy(np.concatenate(a)) for a in (task.logprobs, task.entropies, task.values)))
    metrics = ppo_metrics(now, _then(task.job.rows, device), task.job.loss, task.denominator)
    fine = all(bool(torch.isfinite(gradient).all()) for gradient in task.gradients.values())
    if not (fine and np.isfinite(metrics["loss/total"])):
        raise FailedPrecondition(
            "NONFINITE_LOSS",
            f"the loss of adapter {task.adapter.name!r} is {metrics['loss/total']} or a gradient is not finite: nothing "
            "was added to the pending gradients; look at advantages, returns and old_logprobs",
        )
    exceeded = metrics["policy/ratio"] > task.job.loss.ratio_threshold
    if exceeded:
        for gradient in task.gradients.values():
            gradient.zero_()
        metrics.update({"loss/policy": 0.0, "loss/value": 0.0, "loss/total": 0.0})
    task.adapter.add_gradients(task.gradients)
    return ForwardBackwardResult(
        version=task.version,
        metrics=metrics,
        logprobs=tuple(task.logprobs),
        values=() if task.adapter.weights.value_head is None else tuple(task.values),
        ratio_threshold_exceeded=exceeded,
        facts=task.adapter.facts(),
    )
