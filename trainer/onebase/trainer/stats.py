"""The numbers of a step: PPO's under TRL 0.11.4's names and by its formulas, the others' as far as they have them.

Deviations: `ppo/policy/ratio` is the mean over tokens, not the list of all ratios, padding included;
`objective/logprobs`, `objective/ref_logprobs` and `ppo/policy/advantages` hold completion tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onebase.trainer.advantages import Array, Mask, TokenRewards, masked_mean

Stats: TypeAlias = "dict[str, float | NDArray[np.float64]]"
"""Numbers by name; arrays are the distributions that TRL hands to its loggers as histograms."""


def standard_deviation(values: NDArray[np.float64]) -> float:
    """Unbiased standard deviation; nan for a single value, as torch has it."""
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")


def rollout_stats(
    scores: Array, logprobs: Array, reference_logprobs: Array, rewards: TokenRewards, mask: Mask, kl_coef: float
) -> Stats:
    """objective/* and the scores' part of ppo/*. `scores` is [B], after scaling and clipping; the rest [B, T]."""
    return {
        **kl_stats(rewards.kls * mask, kl_coef),
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": reference_logprobs,
        "objective/entropy": float((-logprobs * mask).sum(axis=1).mean()),
        "ppo/mean_non_score_reward": masked_mean(rewards.non_score, mask),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": standard_deviation(scores),
    }


def kl_stats(kls: Array, kl_coef: float) -> Stats:
    """objective/kl*: the KL of each sequence to the reference, of logprob differences [B, T]."""
    of_sequences = kls.sum(axis=1)
    return {
        "objective/kl": float(of_sequences.mean()),
        "objective/kl_dist": of_sequences,
        "objective/kl_coef": kl_coef,
    }


def length_stats(query_lengths: Sequence[int], response_lengths: Sequence[int]) -> Stats:
    """tokens/*: how long queries and responses are, in tokens; nothing of those that are not known."""
    stats: Stats = {}
    for name, lengths in (("queries", query_lengths), ("responses", response_lengths)):
        if not len(lengths):
            continue
        values = np.asarray(lengths, dtype=np.float64)
        stats[f"tokens/{name}_len_mean"] = float(values.mean())
        stats[f"tokens/{name}_len_std"] = standard_deviation(values)
        stats[f"tokens/{name}_dist"] = values
    return stats


def pass_stats(algorithm: str, passes: Sequence[Mapping[str, float]]) -> Stats:
    """The metrics of all forward and backward passes, averaged, under the algorithm's name."""
    return {f"{algorithm}/{name}": float(np.mean([one[name] for one in passes])) for name in sorted(passes[0])}


def training_stats(passes: Sequence[Mapping[str, float]], advantages: Array, mask: Mask) -> Stats:
    """ppo/*: the metrics of all forward and backward passes, averaged, and the advantages that went in."""
    stats = pass_stats("ppo", passes)
    stats["ppo/policy/advantages"] = advantages[mask]
    error, variance = np.float64(stats["ppo/val/error"]), np.float64(stats["ppo/returns/var"])
    with np.errstate(divide="ignore", invalid="ignore"):  # returns that are all equal have nothing to explain
        stats["ppo/val/var_explained"] = float(1 - error / variance)
    return stats


def reward_stats(rewards: NDArray[np.float64]) -> Stats:
    """env/*: the rewards [B] as they came, before scaling and clipping."""
    return {
        "env/reward_mean": float(rewards.mean()),
        "env/reward_std": standard_deviation(rewards),
        "env/reward_dist": rewards,
    }


def scalars(stats: Stats) -> dict[str, float]:
    """The stats that are one number."""
    return {name: float(value) for name, value in stats.items() if not isinstance(value, np.ndarray)}
