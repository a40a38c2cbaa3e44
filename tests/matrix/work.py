"""What both sides compute: the same texts, prompts and training pass for every case, and the shapes of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]

NEW_TOKENS = 16
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
"""AdamW's first step is lr * g / (|g| + eps): with a small eps the rounding of a gradient near zero is a whole step.
With this one steps are as near as gradients, which are compared too.
"""

MAX_GRAD_NORM = 0.5
LOSS = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.3}


@dataclass(frozen=True)
class Text:
    """A sequence of T tokens whose first `start` are the prompt."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class PassRow:
    """A text to train on; arrays have an entry for each token of the completion."""

    text: Text
    advantages: NDArray[np.float32]
    old_logprobs: NDArray[np.float32]
    old_values: NDArray[np.float32]
    returns: NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Of the tokens of a completion."""

    logprobs: Numbers
    entropy: Numbers
    values: Numbers | None = None


@dataclass(frozen=True)
class Greedy:
    """A completion and its logprobs."""

    tokens: list[int]
    logprobs: Numbers


@dataclass(frozen=True)
class Trained:
    """A pass and a step; gradients are those before clipping."""

    losses: Numbers  # policy, value
    gradients: Mapping[str, Numbers]
    grad_norm: float
    parameters: Mapping[str, Numbers]
    after: Sequence[Scores]


def _texts() -> list[Text]:
    random = np.random.default_rng(3)
    return [Text(random.integers(4, 120, length).tolist(), start) for length, start in ((30, 2), (5, 1), (47, 20))]


def _pass() -> list[PassRow]:
    random = np.random.default_rng(4)

    def normal(count: int, mean: float, spread: float) -> NDArray[np.float32]:
        return random.normal(mean, spread, count).astype(np.float32)

    rows = []
    for text in TEXTS:
        n = len(text.tokens) - text.start
        rows.append(PassRow(text, normal(n, 0, 1), normal(n, -5, 1), normal(n, 0, 1), normal(n, 0, 1)))
    return rows


TEXTS = _texts()
"""One within every window, two beyond; the longest is longer than a step of the worker."""

PROMPTS = [TEXTS[0].tokens[:3], TEXTS[2].tokens[:37]]
PASS = _pass()
