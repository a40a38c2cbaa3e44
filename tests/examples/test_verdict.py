"""The demo judges itself: what it accepts, and what it does not."""

from __future__ import annotations

import dataclasses
import math

import pytest
from stage3 import Latencies
from verdict import Result, shortcomings

UP = Result(1.0, 0.1, 1.7, 1.0, 3.0, 40, 320, ())
DOWN = dataclasses.replace(UP, weight=-1.0, reward_after=-1.5)
ASKED = Latencies(100, 20.0, 90.0)


def test_policies_that_went_where_they_should_are_accepted() -> None:
    assert shortcomings({"policy_1": UP, "policy_2": DOWN}, 0.95, ASKED) == []


@pytest.mark.parametrize(
    ("up", "down", "accuracy", "names"),
    [
        ({"reward_after": 1.5}, {}, 0.95, "policy_1"),
        ({}, {"reward_after": -1.3}, 0.95, "policy_2"),
        ({}, {"reward_after": 1.7}, 0.95, "policy_2"),
        ({"reward_after": math.nan}, {}, 0.95, "policy_1"),
        ({"kl": math.inf}, {}, 0.95, "policy_1"),
        ({}, {}, 0.89, "0.890"),
        ({}, {}, math.nan, "nan"),
    ],
)
def test_what_fell_short_is_named(up: dict[str, float], down: dict[str, float], accuracy: float, names: str) -> None:
    results = {"policy_1": dataclasses.replace(UP, **up), "policy_2": dataclasses.replace(DOWN, **down)}
    [found] = shortcomings(results, accuracy, ASKED)
    assert names in found
