"""Reads what `make oracle` made: no torch, no TRL, only numbers that they once gave."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load_file

from onebase.client import types

FIXTURES = Path(__file__).parent / "fixtures"

TOLERANCE = 1e-5
"""Relative to the largest magnitude. The server is nearer by a factor of ten or more; float32 itself is at 6e-8."""

REWARDS = {"base": ("reward", "reward_2"), "base_gpt2": ("reward_gpt2",)}
POLICIES = {"base": ("policy", "policy_all"), "base_gpt2": ("policy_gpt2",)}

PEFT_WARNINGS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""PEFT 0.21 still asks transformers 5.23 by the old name whenever it makes or loads an adapter."""

Weights = dict[str, NDArray[np.float32]]


def assert_close(actual: ArrayLike, expected: ArrayLike, what: str = "", scale: float = 0.0) -> None:
    """|actual - expected| <= TOLERANCE times the largest |expected|, or times `scale` where that is larger."""
    found, wanted = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == wanted.shape, f"{what}: shape {found.shape} is not {wanted.shape}"
    largest = max(float(np.abs(wanted).max()), scale)
    worst = float(np.abs(found - wanted).max())  # nan if there is one: then the comparison below is false
    assert worst <= TOLERANCE * largest, f"{what}: differs by {worst:.1e}, and its largest magnitude is {largest:.3g}"


def assert_rows_close(actual: Iterable[ArrayLike], expected: Sequence[ArrayLike], what: str) -> None:
    """Ragged rows, all relative to the largest magnitude of any."""
    rows = list(actual)
    assert [len(np.asarray(row)) for row in rows] == [len(np.asarray(row)) for row in expected], what
    assert_close(np.concatenate(rows), np.concatenate([np.asarray(row) for row in expected]), what)


@functools.cache
def expected_scores(base: str) -> dict[str, Any]:
    """What transformers, PEFT and TRL say of this base's fixed sequences."""
    scores: dict[str, Any] = json.loads((FIXTURES / "scores.json").read_text())
    return scores[base]  # type: ignore[no-any-return]


def sequences(base: str) -> list[types.Sequence]:
    """The fixed sequences, each cut into prompt and completion."""
    expected = expected_scores(base)
    cuts = zip(expected["sequences"], expected["prompt_lengths"], strict=True)
    return [types.Sequence(ids[:start], ids[start:]) for ids, start in cuts]


def of_completions(base: str, rows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Of numbers that stand at the place before each token (that is, all but the first), those of completions."""
    expected = expected_scores(base)
    lengths = map(len, expected["sequences"])
    cuts = zip(rows, expected["prompt_lengths"], lengths, strict=True)
    return [row[start - 1 : length - 1] for row, start, length in cuts]


@functools.cache
def replay(scenario: str) -> dict[str, Any]:
    """A training by TRL's PPOTrainer: settings, batches, and everything it computed on the way."""
    record: dict[str, Any] = json.loads((FIXTURES / f"{scenario}.json").read_text())
    return record


def weights_after(scenario: str) -> Weights:
    """The policy's weights and value head when TRL was done."""
    return load_file(FIXTURES / f"{scenario}.safetensors")


def saved_weights(path: str | Path) -> Weights:
    """The weights and the value head, if there is one, of an adapter's directory."""
    weights = load_file(Path(path) / "adapter_model.safetensors")
    head = Path(path) / "value_head.safetensors"
    return weights | (load_file(head) if head.exists() else {})


def assert_same_weights(actual: Weights, expected: Weights) -> None:
    """Every tensor, by its name, relative to its own largest magnitude."""
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, name)


class RecordedOrders(np.random.Generator):
    """Hands out TRL's minibatch orders in turn."""

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        super().__init__(np.random.PCG64(0))
        self._orders = [order for step in steps for order in step["permutations"]]

    @property
    def left(self) -> int:
        return len(self._orders)

    def permutation(self, size: int) -> NDArray[np.int64]:  # type: ignore[override]
        order = np.array(self._orders.pop(0))
        assert len(order) == size
        return order
