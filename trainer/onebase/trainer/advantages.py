"""PPO's arithmetic on a padded batch: token rewards, generalized advantages, whitening. Pure functions.

Arrays are float64 of shape [B, T]: a row per sequence, a column per completion token, zero where a row is padded.
`mask` is boolean [B, T], True where a token counts. The formulas are those of TRL 0.11.4, with two deviations. Whitened
token rewards are zero where no token counts; there they are not, so that padding leaks into the advantages before it.
And the variance of a single token is 0 here, where it is 0/0 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def pad(rows: Sequence[ArrayLike], width: int) -> Array:
    """Stacks rows of at most `width` numbers into [B, width], zeros on the right."""
    padded = np.zeros((len(rows), width))
    for row, numbers in enumerate(rows):
        values = np.asarray(numbers, dtype=np.float64)
        padded[row, : len(values)] = values
    return padded


def masked_mean(values: Array, mask: Mask) -> float:
    """Mean over the tokens that count."""
    return float(values[mask].mean())


def masked_variance(values: Array, mask: Mask) -> float:
    """Unbiased variance over the tokens that count; 0 for a single token."""
    counted = values[mask]
    return float(counted.var(ddof=1)) if counted.size > 1 else 0.0


def whiten(values: Array, mask: Mask, *, shift_mean: bool = True) -> Array:
    """Scales to unit variance over the tokens that count, and to zero mean unless `shift_mean` is False."""
    mean = masked_mean(values, mask)
    whitened: Array = (values - mean) / np.sqrt(masked_variance(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


def kl_penalty(logprobs: Array, reference_logprobs: Array, kind: str) -> Array:
    """What each token's departure from the reference costs; `kind` is "kl", "abs" or "mse"."""
    difference = logprobs - reference_logprobs
    if kind == "kl":
        return difference
    if kind == "abs":
        return np.abs(difference)
    if kind == "mse":
        return 0.5 * np.square(difference)
    raise ValueError(f"kl_penalty {kind!r} is not one of kl, abs, mse")


@dataclass(frozen=True)
class TokenRewards:
    """Rewards of every token, all [B, T]."""

    rewards: Array
    """Penalty, and the score at each row's last token that counts."""
    non_score: Array
    """The penalty alone: -kl_coef times kls."""
    kls: Array
    """kl_penalty of every token."""


def token_rewards(
    scores: Array, logprobs: Array, reference_logprobs: Array, mask: Mask, kl_coef: float, kind: str = "kl"
) -> TokenRewards:
    """r_t = -kl_coef * penalty_t, and the sequence's score [B] added at its last token that counts."""
    kls = kl_penalty(logprobs, reference_logprobs, kind)
    non_score = -kl_coef * kls
    rewards = non_score.copy()
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    rewards[np.arange(len(mask)), last] += scores
    return TokenRewards(rewards, non_score, kls)


@dataclass(frozen=True)
class Advantages:
    """What the loss needs of every token, all [B, T]."""

    values: Array
    """Values, zero where a token does not count."""
    advantages: Array
    """Whitened advantages."""
    returns: Array
    """Targets of the value head: advantages before whitening, plus values."""


def advantages_and_returns(
    values: Array, rewards: Array, mask: Mask, *, gamma: float, lam: float, whiten_rewards: bool = False
) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16), whitened over the whole batch."""
    values = values * mask
    rewards = rewards * mask
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False) * mask
    raw = np.zeros_like(values)
    following = np.zeros(len(values))  # advantage of the next token
    next_values = np.zeros(len(values))
    for column in reversed(range(values.shape[1])):
        delta = rewards[:, column] + gamma * next_values - values[:, column]
        raw[:, column] = following = delta + gamma * lam * following
        next_values = values[:, column]
    return Advantages(values=values, advantages=whiten(raw, mask), returns=raw + values)
