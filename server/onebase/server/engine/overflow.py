"""Whether an optimizer step would leave numbers that are not finite, known before anything is changed.

A bound from a few norms says no for every ordinary step. Where it cannot, the step is made on copies, a parameter at a
time, and looked at: so a step is refused if and only if its own numbers overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from onebase.server.engine import optimizer
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import AdamW

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Moments

Tensors = Mapping[str, torch.Tensor]

SAFE = 1e30
"""Far below what float32 holds: what stays below it in real numbers stays finite in any order of operations."""


@torch.no_grad()
def refuse(
    name: str,
    parameters: Tensors,
    gradients: Tensors,
    moments: Moments,
    settings: AdamW,
    norm: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    """Refuses a step that would leave a weight or moment that is not finite.

    Args:
        name: the adapter's.
        parameters: as they are before the step.
        gradients: by parameter, before clipping.
        moments: before the step.
        settings: of the step.
        norm: of all gradients, after clipping; finite, like its square.
        scale: what clipping multiplies the gradients by; None does not clip.

    Raises:
        FailedPrecondition: NONFINITE_WEIGHTS, naming the setting to blame.
    """
    if _bounded(parameters, moments, settings, float(norm)):
        return
    for key, parameter in parameters.items():
        gradient = gradients[key].clone() if scale is None else gradients[key] * scale
        weight, first, second = (t.detach().clone() for t in (parameter, moments.exp_avg[key], moments.exp_avg_sq[key]))
        before = torch.tensor(float(moments.step), device=parameter.device)
        optimizer.step([weight], [gradient], [first], [second], [before], settings)
        if not all(bool(torch.isfinite(t).all()) for t in (weight, first, second)):
            field, way_out = _blame(settings)
            raise FailedPrecondition(
                "NONFINITE_WEIGHTS",
                f"a step with learning_rate {settings.learning_rate:g}, weight_decay {settings.weight_decay:g} and eps "
                f"{settings.eps:g} would make {key} of adapter {name!r} infinite or NaN: nothing was changed, and the "
                f"gradients still wait; {way_out}",
                field=field,
            )


def _bounded(parameters: Tensors, moments: Moments, settings: AdamW, gradient: float) -> bool:
    """Whether every number on the step's way is surely below SAFE."""
    weight, first, second = (
        float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors.values())))))
        for tensors in (parameters, moments.exp_avg, moments.exp_avg_sq)
    )
    rate, decay = settings.learning_rate, settings.learning_rate * settings.weight_decay
    rate /= 1 - settings.beta1 ** (moments.step + 1)
    largest = (first + gradient) / settings.eps
    numbers = (weight * (1 + decay), decay, rate, largest, rate * largest, second, gradient * gradient, settings.eps)
    return settings.eps > 1 / SAFE and all(number < SAFE for number in numbers)  # NaN is not below


def _blame(settings: AdamW) -> tuple[str, str]:
    """The field that makes a step too large, and the way out."""
    if settings.learning_rate * settings.weight_decay > 2:  # then it makes weights larger, not smaller
        return "adamw.weight_decay", "use a smaller weight_decay"
    if settings.eps < 1 / SAFE:
        return "adamw.eps", "use a larger eps, as 1e-8: where a gradient is 0, nothing else is in the denominator"
    return "adamw.learning_rate", "use a smaller learning_rate, or a max_grad_norm"
