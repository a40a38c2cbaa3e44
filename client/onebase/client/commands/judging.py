"""Asks the reward adapters about responses and writes their answers; shared by the ways to use `onebase reward`."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from onebase.client.client import Client
from onebase.client.commands.options import Chatting
from onebase.client.types import Content, Reward, Sequence


@dataclass(frozen=True)
class Verdict:
    """A response and its scores."""

    prompt: Content
    response: Content
    reward: Reward

    @property
    def score(self) -> float:
        """The mean over the reward adapters; the score itself if there is one."""
        return fmean(self.reward.scores.values())

    def record(self) -> dict[str, Any]:
        """As an object for JSON."""
        return {**self.said(), **self.scores()}

    def said(self) -> dict[str, Any]:
        """What was judged."""
        return {"prompt": self.prompt, "response": self.response}

    def scores(self) -> dict[str, Any]:
        """What came of it."""
        return {"score": self.score, "scores": dict(self.reward.scores)}


@dataclass(frozen=True)
class Judge:
    """The reward adapters to ask; none means the server's only one."""

    client: Client
    adapters: tuple[str, ...]
    chatting: Chatting

    def __call__(self, pairs: SequenceABC[tuple[Content, Content]]) -> list[Verdict]:
        """A verdict for each pair of prompt and response, in their order."""
        sequences = [Sequence(self.chatting.prompt(one), self.chatting.response(other)) for one, other in pairs]
        rewards = self.client.reward(sequences, self.adapters or None)
        return [Verdict(*pair, reward) for pair, reward in zip(pairs, rewards, strict=True)]


def ranked(verdicts: SequenceABC[Verdict]) -> list[Verdict]:
    """Best first; of equals, the first stays first."""
    return sorted(verdicts, key=lambda verdict: -verdict.score)


def number(score: float) -> str:
    """A score for people."""
    return f"{score:+.4f}"
