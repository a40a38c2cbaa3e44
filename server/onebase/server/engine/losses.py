"""Losses: pure functions of what the current weights say and what the client sent.

Every loss has one signature, so that another is another entry of LOSSES. A loss is a sum over tokens (of DPO, over
pairs) divided by a denominator that is known beforehand; so a batch may be cut into micro-batches and their gradients
add up.
"""

# What a loss has no settings or numbers for, its signature has all the same.
# ruff: noqa: ARG001

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from onebase.server.jobs import (
    CrossEntropyLoss,
    CustomLoss,
    DpoLoss,
    Floats,
    ImportanceSamplingLoss,
    PpoLoss,
    TrainRow,
    ValueLoss,
)

Numbers = dict[str, torch.Tensor]
"""By a metric's name, a tensor of one number."""


@dataclass(frozen=True)
class Now:
    """What the current weights say about n tokens. Gradients flow through what the loss needs."""

    logprobs: torch.Tensor  # [n]; zeros where the loss needs no logits
    entropy: torch.Tensor  # [n], nats; zeros where the loss needs no logits
    values: torch.Tensor  # [n]; zeros without a value head


@dataclass(frozen=True)
class Then:
    """What the client sent for the same n tokens; zeros for what it did not send."""

    logprobs: torch.Tensor  # [n], of the policy that sampled
    values: torch.Tensor  # [n]
    advantages: torch.Tensor  # [n]
    returns: torch.Tensor  # [n]
    mask: torch.Tensor  # [n], 1.0 where a token counts
    weights: torch.Tensor  # [n], what it weighs in the sum: 0.0 where it does not count
    reference: torch.Tensor  # [n], logprobs
    by_logprob: torch.Tensor  # [n], d loss / d logprob
    by_value: torch.Tensor  # [n]
    by_entropy: torch.Tensor  # [n]
    lengths: tuple[int, ...]  # tokens of each row; their sum is n

    @classmethod
    def of(cls, rows: Sequence[TrainRow], device: torch.device) -> Then:
        """What the client sent for the completion tokens of these rows, end to end."""
        lengths = tuple(len(row.tokens) - row.start for row in rows)

        def flat(arrays: Sequence[Floats | None], absent: float = 0.0) -> torch.Tensor:
            if all(array is None for array in arrays):
                return torch.full((sum(lengths),), absent, device=device)
            parts = [
                np.full(length, absent, dtype=np.float32) if array is None else array.astype(np.float32)
                for array, length in zip(arrays, lengths, strict=True)
            ]
            return torch.from_numpy(np.concatenate(parts)).to(device)

        mask = flat([row.mask.astype(np.float32) for row in rows])
        return cls(
            logprobs=flat([row.old_logprobs for row in rows]),
            values=flat([row.old_values for row in rows]),
            advantages=flat([row.advantages for row in rows]),
            returns=flat([row.returns for row in rows]),
            mask=mask,
            weights=mask * flat([row.weights for row in rows], 1.0),
            reference=flat([row.reference_logprobs for row in rows]),
            by_logprob=flat([row.logprob_gradients for row in rows]),
            by_value=flat([row.value_gradients for row in rows]),
            by_entropy=flat([row.entropy_gradients for row in rows]),
            lengths=lengths,
        )

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Of [n], over the tokens that count."""
        return (x * self.mask).sum() / self.mask.sum()

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """Of [n], over the tokens that count: Bessel's, as TRL's masked_var; 0 for a single token."""
        count = self.mask.sum()
        return self.mean((x - self.mean(x)) ** 2) * count / torch.clamp(count - 1, min=1)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each row's part of [n]: [rows]."""
        return torch.stack([part.sum() for part in torch.split(x * self.weights, list(self.lengths))])


# -------------------------------------------------------------------------------------------------------- PPO


def ppo(now: Now, then: Then, settings: PpoLoss) -> Numbers:
    """The clipped PPO loss, the clipped value loss, a KL penalty and an entropy bonus.

    Σ max(-A·ratio, -A·clip(ratio, 1 - ε, 1 + ε_high)) and 0.5 · Σ max((v - R)², (clip(v, v_old ± ε_v) - R)²), as TRL
    0.11.4 computes them. Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7; the value clip as in OpenAI
    baselines; ε_high as in Yu et al. 2025 (arXiv:2503.14476), equation 10.
    """
    free, clipped = _surrogates(now, then, settings)
    policy = (torch.maximum(free, clipped) * then.weights).sum()
    value = value_loss(now, then, settings)["loss/value"]
    total = policy if not settings.vf_coef else policy + settings.vf_coef * value
    if settings.kl_coef:
        total = total + settings.kl_coef * (_kl(now, then) * then.weights).sum()
    if settings.entropy_coef:
        total = total - settings.entropy_coef * (now.entropy * then.weights).sum()
    return {"loss/policy": policy, "loss/value": value, "loss/total": total}


def ppo_statistics(now: Now, then: Then, settings: PpoLoss) -> Numbers:
    """TRL's of a whole minibatch under its names (without "ppo/"), over the tokens that count."""
    free, clipped = _surrogates(now, then, settings)
    found = {
        **importance_sampling_statistics(now, then, settings),
        "policy/clipfrac": then.mean((clipped > free).double()),
        "policy/advantages_mean": then.mean(then.advantages),
        **value_statistics(now, then, settings),
    }
    return found if not settings.kl_coef else {**found, "policy/kl": then.mean(_kl(now, then))}


def _surrogates(now: Now, then: Then, settings: PpoLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's loss of each token, [n], with the ratio as it is and with the ratio clipped."""
    ratio = _ratio(now, then)
    high = settings.cliprange if settings.cliprange_high is None else settings.cliprange_high
    return -then.advantages * ratio, -then.advantages * torch.clamp(ratio, 1.0 - settings.cliprange, 1.0 + high)


def _ratio(now: Now, then: Then) -> torch.Tensor:
    """[n]; 1 where a token does not count, whatever was sent for it, so that it cannot overflow."""
    return torch.exp((now.logprobs - then.logprobs) * then.mask)


def _kl(now: Now, then: Then) -> torch.Tensor:
    """An estimate of the KL divergence from the reference, [n]: unbiased, and never negative.

    Source: Schulman 2020, "Approximating KL divergence" (k3); Shao et al. 2024 (arXiv:2402.03300), equation 4.
    """
    difference = (then.reference - now.logprobs) * then.mask
    return torch.exp(difference) - difference - 1.0


# ------------------------------------------------------------------------------------------------- value loss


def value_loss(now: Now, then: Then, settings: PpoLoss | ValueLoss) -> Numbers:
    """The clipped value loss, as `ppo` has it."""
    free, clipped = _squares(now, then, settings)
    value = 0.5 * (torch.maximum(free, clipped) * then.weights).sum()
    return {"loss/value": value, "loss/total": value}


def value_statistics(now: Now, then: Then, settings: PpoLoss | ValueLoss) -> Numbers:
    """Of estimates and returns, over the tokens that count."""
    free, clipped = _squares(now, then, settings)
    return {
        "returns/mean": then.mean(then.returns),
        "returns/var": then.variance(then.returns),
        "val/vpred": then.mean(now.values),
        "val/error": then.mean(free),
        "val/clipfrac": then.mean((clipped > free).double()),
        "val/mean": then.mean(then.values),
        "val/var": then.variance(then.values),
    }


def _squares(now: Now, then: Then, settings: PpoLoss | ValueLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared error of each token's value, [n], as it is and with the value clipped."""
    close = torch.maximum(
        torch.minimum(now.values, then.values + settings.cliprange_value), then.values - settings.cliprange_value
    )
    return (now.values - then.returns) ** 2, (close - then.returns) ** 2


# ---------------------------------------------------------------------------------------------------- the others


def importance_sampling(now: Now, then: Then, settings: ImportanceSamplingLoss) -> Numbers:
    """The policy gradient with importance sampling: Σ -A·ratio."""
    policy = (-then.advantages * _ratio(now, then) * then.weights).sum()
    return {"loss/policy": policy, "loss/total": policy}


def importance_sampling_statistics(now: Now, then: Then, settings: ImportanceSamplingLoss | PpoLoss) -> Numbers:
    """How far the policy is from the one that sampled, under TRL's names, over the tokens that count."""
    difference = now.logprobs - then.logprobs
    return {
        "policy/entropy": then.mean(now.entropy),
        "policy/approxkl": 0.5 * then.mean(difference**2),
        "policy/policykl": then.mean(-difference),
        "policy/ratio": then.mean(_ratio(now, then)),
    }


def cross_entropy(now: Now, then: Then, settings: CrossEntropyLoss) -> Numbers:
    """Supervised fine-tuning: Σ -logprob."""
    found = -(now.logprobs * then.weights).sum()
    return {"loss/cross_entropy": found, "loss/total": found}


def cross_entropy_statistics(now: Now, then: Then, settings: CrossEntropyLoss) -> Numbers:
    """Over the tokens that count, whatever they weigh."""
    return {"policy/entropy": then.mean(now.entropy), "perplexity": torch.exp(then.mean(-now.logprobs))}


def dpo(now: Now, then: Then, settings: DpoLoss) -> Numbers:
    """Direct preference optimization: Σ -log sigmoid(beta·margin) over pairs of rows, chosen then rejected.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; with label smoothing ε it is (1 - ε) times that and ε
    times that of the pair the other way round (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    chosen, rejected = _implicit_rewards(now, then, settings)
    right, wrong = functional.logsigmoid(chosen - rejected), functional.logsigmoid(rejected - chosen)
    found = -((1.0 - settings.label_smoothing) * right + settings.label_smoothing * wrong).sum()
    return {"loss/dpo": found, "loss/total": found}


def dpo_statistics(now: Now, then: Then, settings: DpoLoss) -> Numbers:
    """Means over pairs, under the names of TRL's DPOTrainer."""
    chosen, rejected = _implicit_rewards(now, then, settings)
    logprobs = then.of_rows(now.logprobs)
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": logprobs[0::2].mean(),
        "logps/rejected": logprobs[1::2].mean(),
        "policy/entropy": then.mean(now.entropy),
    }


def _implicit_rewards(now: Now, then: Then, settings: DpoLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """beta · (logprob - reference's) of the chosen and of the rejected rows, [pairs] each."""
    rewards = settings.beta * then.of_rows(now.logprobs - then.reference)
    return rewards[0::2], rewards[1::2]


def custom(now: Now, then: Then, settings: CustomLoss) -> Numbers:
    """The client's own loss as far as its derivatives tell it: their products with what they are derivatives by."""
    terms = then.by_logprob * now.logprobs + then.by_value * now.values + then.by_entropy * now.entropy
    return {"loss/total": (terms * then.weights).sum()}


def custom_statistics(now: Now, then: Then, settings: CustomLoss) -> Numbers:
    """What can be said of a loss that is not known."""
    return {"policy/entropy": then.mean(now.entropy)}


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Loss:
    """A loss: its sums, of which "loss/total" is trained on, and its statistics of a whole pass."""

    sums: Callable[[Now, Then, Any], Numbers]
    statistics: Callable[[Now, Then, Any], Numbers]


LOSSES: Mapping[type, Loss] = {
    PpoLoss: Loss(ppo, ppo_statistics),
    ImportanceSamplingLoss: Loss(importance_sampling, importance_sampling_statistics),
    CrossEntropyLoss: Loss(cross_entropy, cross_entropy_statistics),
    DpoLoss: Loss(dpo, dpo_statistics),
    CustomLoss: Loss(custom, custom_statistics),
    ValueLoss: Loss(value_loss, value_statistics),
}
"""The loss that a settings class asks for."""
