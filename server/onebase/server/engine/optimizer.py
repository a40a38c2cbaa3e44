"""One AdamW step on tensors (Loshchilov and Hutter 2019, algorithm 2): the only place that says how it is made."""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from onebase.server.jobs import AdamW

Tensors = list[torch.Tensor]


@torch.no_grad()
def step(
    parameters: Tensors, gradients: Tensors, first: Tensors, second: Tensors, steps: Tensors, settings: AdamW
) -> None:
    """The step in place; torch's fused one takes no memory, so it cannot be half made.

    Args:
        parameters: float32.
        gradients: of the parameters, as are the moments `first` and `second`.
        steps: for each parameter the number of steps before this one, which torch counts up.
        settings: of the step.
    """
    adamw(
        parameters,
        gradients,
        first,
        second,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )
