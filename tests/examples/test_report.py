"""The demo judges itself: what it accepts, what it does not, and what it draws."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report import failures, plot, quantile

DIRECTIONS = {"policy_1": 1.0, "policy_2": -1.0}
GOOD: dict[str, Any] = {
    "policies": {
        "policy_1": {"reward_before": 0.1, "reward_after": 1.7, "reward_std_before": 1.0, "kl": 3.0},
        "policy_2": {"reward_before": 0.1, "reward_after": -1.5, "reward_std_before": 1.0, "kl": 2.0},
    },
    "reward_model": {"pair_accuracy": 0.95},
}


def test_policies_that_went_where_they_should_are_accepted() -> None:
    assert failures(GOOD, DIRECTIONS) == []


@pytest.mark.parametrize(
    ("place", "key", "value", "sentence"),
    [
        ("policy_1", "reward_after", 1.5, "policy_1 moved the reward by 1.40"),
        ("policy_2", "reward_after", -1.3, "policy_2 moved the reward by 1.40"),
        ("policy_2", "reward_after", 1.7, "policy_2 moved the reward by -1.60"),
        ("policy_1", "reward_after", math.nan, "policy_1 moved the reward by nan"),
        ("policy_1", "kl", math.inf, "policy_1's KL is inf"),
        ("reward_model", "pair_accuracy", 0.89, "ranks 89.0%"),
    ],
)
def test_what_fell_short_is_named(place: str, key: str, value: float, sentence: str) -> None:
    summary = copy.deepcopy(GOOD)
    (summary["policies"].get(place) or summary[place])[key] = value
    [found] = failures(summary, DIRECTIONS)
    assert sentence in found


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_a_value_with_that_share_at_or_below(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    rows = [{"step": i, "reward/r": i / 3, "objective/kl": i / 9} for i in range(1, 6)]
    plot(tmp_path / "curves.png", {"policy_1": rows, "policy_2": rows}, "reward/r")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
