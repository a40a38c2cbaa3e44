"""Evaluation: the reward of completions of fixed prompts, drawn with a fixed seed, so that two of them compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onebase.trainer.config import TrainConfig
from onebase.trainer.prompts import Prompt, PromptRow
from onebase.trainer.rewards import Judge
from onebase.trainer.rollout import roll_out
from onebase.trainer.stats import standard_deviation

if TYPE_CHECKING:
    from onebase.client import Session


@dataclass(frozen=True)
class Evaluation:
    """Completions of the evaluation's prompts, and what they are worth."""

    prompts: tuple[Prompt, ...]
    completions: tuple[str, ...]
    rewards: tuple[float, ...]
    """The weighted sum that is maximized."""
    raw: Mapping[str, tuple[float, ...]]
    """The unweighted scores, by reward adapter."""

    @property
    def mean(self) -> float:
        """Mean reward."""
        return float(np.mean(self.rewards))

    @property
    def std(self) -> float:
        """Unbiased standard deviation of the rewards over the prompts."""
        return standard_deviation(np.array(self.rewards))

    @property
    def raw_means(self) -> dict[str, float]:
        """Mean unweighted score, by reward adapter."""
        return {name: float(np.mean(scores)) for name, scores in self.raw.items()}

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them again."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """What `as_json` gave, after JSON."""
        return cls(
            prompts=tuple(data["prompts"]),
            completions=tuple(data["completions"]),
            rewards=tuple(data["rewards"]),
            raw={name: tuple(scores) for name, scores in data["raw"].items()},
        )


def evaluate(session: Session, judge: Judge, rows: Sequence[PromptRow], config: TrainConfig) -> Evaluation | None:
    """Evaluates the policy as it is now; None if the configuration wants no evaluation, or has no rewards."""
    chosen = rows[: config.eval.samples] if config.has_rewards else ()
    if not chosen:
        return None
    rollout = roll_out(session, chosen, config.generation, config.eval.seed)
    judged = judge(session, rollout)
    return Evaluation(
        prompts=tuple(rollout.prompts),
        completions=tuple(rollout.texts),
        rewards=tuple(judged.rewards.tolist()),
        raw={name: tuple(scores.tolist()) for name, scores in judged.raw.items()},
    )
