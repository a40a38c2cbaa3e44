"""When there will be room again: from how long what is under way has gone on, and how long such work took of late.

The answer is for a client that comes again exactly then: by then the room that it needs is free in nine cases of ten,
also for those who were sent away before it. It is an estimate: work may take longer than it did, and whoever comes
unasked may be quicker.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np

SHORTEST, LONGEST = 0.05, 60.0
"""Bounds of what is told, in seconds."""

_SAMPLES = 64  # durations that are remembered
_ALIKE = 32  # running pieces of work that stand for all of them
_QUANTILE = 1.3  # of the normal distribution: nine times of ten
_FIRST_GUESS = 1.0  # seconds that work takes, as long as none has ended


class Forecast:
    """Of work under one limit. Work has units, such as completions; those of one piece end together.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._running: dict[int, tuple[float, int]] = {}  # when it began, its units
        self._units = 0
        self._durations: deque[float] = deque(maxlen=_SAMPLES)
        self._told: deque[tuple[float, int]] = deque()  # who comes back when, for how many units
        self._awaited = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._running

    def begin(self, units: int = 1) -> int:
        """Takes work in; the number that `end` wants."""
        number = next(self._numbers)
        self._running[number] = (self._clock(), units)
        self._units += units
        return number

    def end(self, number: int) -> None:
        """Work has ended, one way or another."""
        began, units = self._running.pop(number)
        self._units -= units
        self._durations.append(self._clock() - began)

    def wait(self, units: int = 1) -> float:
        """Seconds until so many units more will be free, behind those who were told before; notes that it was told.

        Args:
            units: that must end before the caller's work can begin.
        """
        now = self._clock()
        while self._told and self._told[0][0] <= now:
            self._awaited -= self._told.popleft()[1]
        # Who calls without waiting would otherwise put everybody off for ever.
        ahead = min(self._awaited, self._units)
        seconds = min(LONGEST, max(SHORTEST, self._until(ahead + units, now)))
        if not self._told or now + seconds >= self._told[-1][0]:
            self._told.append((now + seconds, units))
            self._awaited += units
        return seconds

    def _until(self, units: int, now: float) -> float:
        """Seconds until so many units have ended, as likely as not to be late one time in ten."""
        if not self._running:
            return 0.0
        whole = self._mean()
        rounds, units = divmod(units - 1, self._units)  # more than there are: those that come after them must end too
        began, sizes = self._sample()
        left = self._remaining(now - began)  # [work, sample]
        low, high = 0.0, float(left.max())
        scale = self._units / sizes.sum()
        for _ in range(20):
            middle = (low + high) / 2
            ended = (left <= middle).mean(axis=1)
            expected = scale * float((sizes * ended).sum())
            doubt = math.sqrt(scale * float((sizes**2 * ended * (1 - ended)).sum()))
            low, high = (low, middle) if expected - _QUANTILE * doubt >= units + 0.5 else (middle, high)
        return high + rounds * whole

    def _mean(self) -> float:
        return sum(self._durations) / len(self._durations) if self._durations else _FIRST_GUESS

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        step = max(1, len(self._running) // _ALIKE)
        chosen = list(itertools.islice(self._running.values(), 0, None, step))
        return np.array([began for began, _ in chosen]), np.array([units for _, units in chosen], dtype=float)

    def _remaining(self, ages: np.ndarray) -> np.ndarray:
        """How much longer work of these ages may take: as the remembered took that were as old, or as long again."""
        took = np.array(self._durations or [_FIRST_GUESS])
        left = took[None, :] - ages[:, None]
        older = left > 0
        count = older.sum(axis=1, keepdims=True)
        # Each row is made of its positive entries alone, repeated to the row's length.
        order = np.argsort(~older, axis=1, kind="stable")
        packed = np.take_along_axis(left, order, axis=1)
        rows = packed[np.arange(len(ages))[:, None], np.arange(took.size)[None, :] % np.maximum(count, 1)]
        found: np.ndarray = np.where(count > 0, rows, np.maximum(ages[:, None], SHORTEST))
        return found
