"""The judge: what is flat passes whatever it does meanwhile, and what leaks does not."""

from __future__ import annotations

import numpy as np
import pytest
from soak.run import BOUNDS, LIMITS, MIB, WARM_UP, judge, over
from soak.slope import blocks, slope
from soak.watch import Samples

SECONDS = np.arange(0, 1500, 3.0)


def noise(seed: int, scale: float) -> np.ndarray:
    """Of memory: slow waves, fast jitter, and a spike at times."""
    dice = np.random.default_rng(seed)
    waves = scale * np.sin(SECONDS / 140 + dice.uniform(0, 6))
    spikes = (dice.random(len(SECONDS)) < 0.02) * dice.uniform(10, 60, len(SECONDS)) * MIB
    return waves + dice.normal(0, scale, len(SECONDS)) + spikes


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_flat(seed: int) -> None:
    found = slope(SECONDS, 300 * MIB + noise(seed, 4 * MIB))
    assert not found.above(0.5 * MIB)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("leak", [1.5, 6.0])
def test_a_leak_is_one_in_the_same_noise(seed: int, leak: float) -> None:
    found = slope(SECONDS, 300 * MIB + noise(seed, 2 * MIB) + leak * MIB * SECONDS / 60)
    assert found.above(0.5 * MIB)
    assert abs(found.value / MIB - leak) < 0.5


HALF = np.arange(0, 30 * 60 * (1 - WARM_UP), 3.0)
"""The part of half an hour that is judged."""


def memory(seed: int, leak: float, jump: float = 0.0) -> Samples:
    """Of a server as it was seen in such a half: samples within .3 MiB, a slow wave, one jump, and so much growth."""
    dice = np.random.default_rng(seed)
    wander = 0.3 * np.sin(HALF / 90 + dice.uniform(0, 6)) + dice.normal(0, 0.3, len(HALF))
    held = 420 + wander + leak * HALF / 60 + jump * (dice.uniform(0.2, 0.8) * HALF[-1] < HALF)
    samples = Samples(list(HALF), {name: [0.0] * len(HALF) for name in LIMITS})
    samples.series["rss_bytes"] = list(held * MIB)
    return samples


@pytest.mark.parametrize("seed", range(20))
def test_memory_just_below_its_limit_passes_and_just_above_does_not(seed: int) -> None:
    assert LIMITS["rss_bytes"] == 0.15 * MIB
    assert judge(memory(seed, 0.1)) == []
    (failure,) = judge(memory(seed, 0.2))
    assert failure.startswith("rss_bytes grows by")


@pytest.mark.parametrize("seed", range(20))
def test_one_jump_of_the_heap_is_no_leak_and_hides_none(seed: int) -> None:
    assert judge(memory(seed, 0.04, jump=4.0)) == []
    assert len(judge(memory(seed, 0.25, jump=4.0))) == 1


def test_jumps_that_come_again_and_again_are_a_leak() -> None:
    samples = memory(0, 0.0)
    steps = 2 * MIB * np.floor(HALF / 240)
    samples.series["rss_bytes"] = list(np.asarray(samples.series["rss_bytes"]) + steps)
    assert len(judge(samples)) == 1


def test_five_gib_a_week_are_a_leak() -> None:
    assert len(judge(memory(0, 5 * 1024 / (7 * 24 * 60)))) == 1


def test_a_tenants_rows_have_a_bound_at_every_moment_and_are_full_at_first() -> None:
    full = {name: [float(bound)] * 5 for name, bound in BOUNDS.items()}
    assert over(Samples([0, 1, 2, 3, 4], full)) == []
    for name, bound in BOUNDS.items():
        one_more = {**full, name: [bound, bound, bound + 1, bound, bound]}
        assert over(Samples([0, 1, 2, 3, 4], one_more)) == [f"{name} was {bound + 1}, and may be {bound}"]
        (failure,) = over(Samples([0, 1, 2, 3, 4], {**full, name: [0, bound, bound, bound, bound]}))
        assert "not full" in failure


def test_a_leak_in_steps_is_one() -> None:
    """A file descriptor more every four minutes."""
    assert slope(SECONDS, 40 + np.floor(SECONDS / 240)).above(0.05)


def test_one_step_is_none() -> None:
    """A thread that begins once, and descriptors that come and go."""
    assert not slope(SECONDS, np.where(SECONDS > 300, 21, 20)).above(0.05)
    assert not slope(SECONDS, 40 + np.arange(len(SECONDS)) % 7).above(0.05)


def test_what_shrinks_is_no_leak() -> None:
    assert slope(SECONDS, 300 * MIB - MIB * SECONDS / 60).high < 0


def test_blocks_are_medians() -> None:
    times, values = blocks([0, 5, 9, 10, 15], [1, 100, 2, 7, 9], 10)
    assert times.tolist() == [5 / 60, 12.5 / 60]
    assert values.tolist() == [2, 8]


def test_too_few_samples_are_not_judged() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope([0, 20, 40], [1, 2, 3])
