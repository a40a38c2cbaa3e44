"""Asks the reward adapters about responses and writes their answers; shared by the ways to use `onebase reward`."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from onebase.client.client import Client
from onebase.client.types import Reward, Sequence


@dataclass(frozen=True)
class Verdict:
    """A response and its scores."""

    prompt: str
    response: str
    reward: Reward

    @property
    def score(self) -> float:
        """The mean over the reward adapters; the score itself if there is one."""
        return fmean(self.reward.scores.values())

    def record(self) -> dict[str, Any]:
        """As an object for JSON."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "score": self.score,
            "scores": dict(self.reward.scores),
        }


@dataclass(frozen=True)
class Judge:
    """The reward adapters to ask; none means the server's only one."""

    client: Client
    adapters: tuple[str, ...]

    def __call__(self, pairs: SequenceABC[tuple[str, str]]) -> list[Verdict]:
        """A verdict for each pair of prompt and response, in their order."""
        rewards = self.client.reward([Sequence(*pair) for pair in pairs], self.adapters or None)
        return [Verdict(*pair, reward) for pair, reward in zip(pairs, rewards, strict=True)]


def ranked(verdicts: SequenceABC[Verdict]) -> list[Verdict]:
    """Best first; of equals, the first stays first."""
    return sorted(verdicts, key=lambda verdict: -verdict.score)


def number(score: float) -> str:
    """A score for people."""
    return f"{score:+.4f}"
