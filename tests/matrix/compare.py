"""One case: made, asked of both sides, and what differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matrix import plain
from matrix.cases import CASES
from matrix.served import POLICY, serve
from matrix.work import Greedy, Numbers, Scores, Trained

from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import BASE

TOLERANCE = 1e-5
"""Largest difference, relative to the largest magnitude of its kind; float32 itself is at 6e-8."""

KINDS = ("generate", "logprob", "reward", "train")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: differences by kind (None where transformers has no such thing), or why it was refused."""

    architecture: str
    differences: Mapping[str, float | None]
    reason: str | None = None
    exact: bool = False
    """Whether Generate's numbers are Logprob's bit for bit, on this machine."""

    @property
    def status(self) -> str:
        """proven, refused, or different: that is a fault of the engine, which should have refused it."""
        if self.reason is not None:
            return "refused"
        fine = all(found is None or found <= TOLERANCE for found in self.differences.values())
        return "proven" if fine else "different"


def run(name: str, place: Path, *, tied: bool) -> Outcome:
    """Makes a case in a directory and compares the engine with transformers and PEFT."""
    case = CASES[name]
    plain.make_base(case, place, tied=tied)
    try:
        with serve(place / "base") as served:
            oracle = plain.Plain(case, place)
            served.load(place, reward=oracle.has_rewards)
            completions = served.greedy()
            differences = {
                "generate": max(
                    _completions(completions[uid], oracle.greedy(adapted=uid == POLICY)) for uid in (BASE, POLICY)
                ),
                "logprob": max(
                    _scores(served.scores(BASE), oracle.base_scores()),
                    _scores(served.scores(POLICY), oracle.policy_scores()),
                ),
                "reward": difference([served.rewards()], [oracle.rewards()]) if oracle.has_rewards else None,
                "train": _trained(served.train(), oracle.train()),
            }
    except FailedPrecondition as error:
        return Outcome(plain.architecture(place), {}, error.message)
    return Outcome(served.architecture, differences, exact=served.exact)


def difference(found: Iterable[object], wanted: Iterable[object]) -> float:
    """The largest difference of several arrays, relative to the largest magnitude of what is wanted."""
    pairs = [(np.asarray(f, np.float64), np.asarray(w, np.float64)) for f, w in zip(found, wanted, strict=True)]
    if any(f.shape != w.shape or not np.isfinite(f).all() for f, w in pairs):
        return math.inf
    largest = max(float(np.abs(w).max()) for _, w in pairs)
    return max(float(np.abs(f - w).max()) for f, w in pairs) / largest


def _scores(found: list[Scores], wanted: list[Scores]) -> float:
    parts = ["logprobs", "entropy"] + (["values"] if wanted[0].values is not None else [])
    return max(difference([getattr(f, p) for f in found], [getattr(w, p) for w in wanted]) for p in parts)


def _completions(found: list[Greedy], wanted: list[Greedy]) -> float:
    if [one.tokens for one in found] != [one.tokens for one in wanted]:
        return math.inf
    return difference([one.logprobs for one in found], [one.logprobs for one in wanted])


def _trained(found: Trained, wanted: Trained) -> float:
    if not found.gradients.keys() == wanted.gradients.keys() == found.parameters.keys() == wanted.parameters.keys():
        return math.inf
    return max(
        difference([found.losses], [wanted.losses]),
        difference([[found.grad_norm]], [[wanted.grad_norm]]),
        _named(found.gradients, wanted.gradients),
        _named(found.parameters, wanted.parameters),
        _scores(list(found.after), list(wanted.after)),
    )


def _named(found: Mapping[str, Numbers], wanted: Mapping[str, Numbers]) -> float:
    """Every tensor, relative to its own largest magnitude."""
    return max(difference([found[name]], [tensor]) for name, tensor in wanted.items())
