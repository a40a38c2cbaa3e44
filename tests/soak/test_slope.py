"""The judge: what is flat passes whatever it does meanwhile, and what leaks does not."""

from __future__ import annotations

import numpy as np
import pytest
from soak.slope import blocks, slope

MIB = 2.0**20
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
