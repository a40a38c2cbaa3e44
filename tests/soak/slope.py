"""Whether a series of samples grows: a robust slope with its confidence interval, held against a limit.

A sample of memory jumps (a batch more, a collection less) and samples close in time are alike, so each block of them is
one median first. The slope is Theil's and Sen's: the median of the slopes between all pairs of blocks, which a quarter
of wild blocks cannot move; the interval is Sen's (1968), from the variance of Kendall's S. A leak is said to be one
where the whole interval lies above the limit, so that chance does not fail a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 2.576
"""Of a normal distribution: 99 % lie within."""
_FEWEST = 8
"""Blocks that a judgement needs."""


@dataclass(frozen=True)
class Slope:
    """Per minute."""

    value: float
    low: float
    high: float

    def above(self, limit: float) -> bool:
        """Whether it grows by more than `limit` a minute, for all that chance can do."""
        return self.low > limit


def blocks(
    seconds: Sequence[float], values: Sequence[float], length: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Medians of the samples in each `length` seconds: times in minutes [n], values [n]."""
    at, of = np.asarray(seconds, dtype=np.float64), np.asarray(values, dtype=np.float64)
    place = np.floor((at - at[0]) / length) if len(at) else at
    there = np.unique(place)
    times = np.array([np.median(at[place == one]) for one in there]) / 60.0
    return times, np.array([np.median(of[place == one]) for one in there])


def without_jump(medians: NDArray[np.float64], least: float, most: float) -> NDArray[np.float64]:
    """The same without its largest rise from one block to the next [n], where that lies between these.

    A heap takes some MiB at once, once, and a rise in the middle of a series is a slope to Theil and Sen. Only one is
    taken away, so that what rises again and again still grows.
    """
    rises = np.diff(medians)
    where = int(np.argmax(rises))
    if not least <= rises[where] <= most:
        return medians
    jump = np.zeros_like(medians)
    jump[where + 1 :] = rises[where] - np.median(rises)
    return medians - jump


def slope(
    seconds: Sequence[float],
    values: Sequence[float],
    length: float = 20.0,
    jump: tuple[float, float] = (math.inf, math.inf),
) -> Slope:
    """How a series grows.

    Args:
        seconds: when each sample was taken, growing.
        values: the samples.
        length: seconds of a block.
        jump: the least and the most of one rise from a block to the next that is no growth.

    Raises:
        ValueError: fewer than eight blocks.
    """
    times, medians = blocks(seconds, values, length)
    count = len(times)
    if count < _FEWEST:
        raise ValueError(f"{count} blocks of {length:g} s are too few to judge: {_FEWEST} at least")
    medians = without_jump(medians, *jump)
    first, second = np.triu_indices(count, 1)
    slopes = np.sort((medians[second] - medians[first]) / (times[second] - times[first]))
    spread = CONFIDENCE * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    return Slope(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))
