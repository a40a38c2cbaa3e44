"""Losses: pure functions of what the current weights say and what the client sent.

Every loss has one signature, so that another is another entry of LOSSES. A loss is a sum over tokens divided by a
denominator that is known beforehand; so a batch may be cut into micro-batches and their gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from onebase.server.jobs import PpoLoss


@dataclass(frozen=True)
class Now:
    """What the current weights say about n tokens; gradients flow through logprobs and values."""

    logprobs: torch.Tensor  # [n]
    entropy: torch.Tensor  # [n], nats, detached
    values: torch.Tensor  # [n]


@dataclass(frozen=True)
class Then:
    """What the client sent for the same n tokens."""

    logprobs: torch.Tensor  # [n], of the policy that sampled
    values: torch.Tensor  # [n]
    advantages: torch.Tensor  # [n]
    returns: torch.Tensor  # [n]
    mask: torch.Tensor  # [n], 1.0 where a token counts


def ppo(now: Now, then: Then, settings: PpoLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped PPO loss and the clipped value loss, each summed over the tokens that count.

    mean max(-A·ratio, -A·clip(ratio, 1 ± ε)) and 0.5 · mean max((v - R)², (clip(v, v_old ± ε_v) - R)²), as TRL 0.11.4
    computes them. Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7; the value clip as in OpenAI baselines.
    """
    ratio = torch.exp(now.logprobs - then.logprobs)
    clipped = torch.clamp(ratio, 1.0 - settings.cliprange, 1.0 + settings.cliprange)
    policy = torch.maximum(-then.advantages * ratio, -then.advantages * clipped)
    close = torch.maximum(
        torch.minimum(now.values, then.values + settings.cliprange_value), then.values - settings.cliprange_value
    )
    value = torch.maximum((now.values - then.returns) ** 2, (close - then.returns) ** 2)
    return (policy * then.mask).sum(), 0.5 * (value * then.mask).sum()


def ppo_metrics(now: Now, then: Then, settings: PpoLoss, denominator: float) -> dict[str, float]:
    """TRL's statistics of a whole minibatch under its names (without "ppo/"), over the tokens that count.

    Args:
        now: detached, all tokens of the minibatch.
        then: the same tokens.
        settings: the loss's.
        denominator: what the loss was divided by.
    """
    mask, count = then.mask, then.mask.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * mask).sum() / count

    def variance(x: torch.Tensor) -> torch.Tensor:  # Bessel's, as TRL's masked_var; 0 for a single token
        return mean((x - mean(x)) ** 2) * count / torch.clamp(count - 1, min=1)

    difference = now.logprobs - then.logprobs
    ratio = torch.exp(difference)
    clipped = torch.clamp(ratio, 1.0 - settings.cliprange, 1.0 + settings.cliprange)
    policy_clipped = (-then.advantages * clipped > -then.advantages * ratio).double()
    close = torch.maximum(
        torch.minimum(now.values, then.values + settings.cliprange_value), then.values - settings.cliprange_value
    )
    value_clipped = ((close - then.returns) ** 2 > (now.values - then.returns) ** 2).double()
    policy_sum, value_sum = ppo(now, then, settings)
    policy_loss, value_loss = policy_sum / denominator, value_sum / denominator
    found = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/total": policy_loss + settings.vf_coef * value_loss,
        "policy/entropy": mean(now.entropy),
        "policy/approxkl": 0.5 * mean(difference**2),
        "policy/policykl": mean(-difference),
        "policy/clipfrac": mean(policy_clipped),
        "policy/advantages_mean": mean(then.advantages),
        "policy/ratio": mean(ratio),
        "returns/mean": mean(then.returns),
        "returns/var": variance(then.returns),
        "val/vpred": mean(now.values),
        "val/error": mean((now.values - then.returns) ** 2),
        "val/clipfrac": mean(value_clipped),
        "val/mean": mean(then.values),
        "val/var": variance(then.values),
    }
    return {name: float(number) for name, number in found.items()}


Loss = Callable[[Now, Then, PpoLoss], tuple[torch.Tensor, torch.Tensor]]

LOSSES: Mapping[type, Loss] = {PpoLoss: ppo}
"""The loss that a settings class asks for."""
