"""When there will be room again: from how long what is under way has gone on, and how long such work took of late.

The answer is for a client that comes again exactly then: by then the room that it needs is free in nine cases of ten,
also for those who were sent away before it. It is an estimate: work may take longer than it did, and whoever comes
unasked may be quicker.
"""

from __future__ import annotations

import functools
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
_QUANTILE = 1.5  # of the normal distribution, a little over nine times of ten: work comes in crowds
_SOON = 0.01  # for such a part of what work takes, a look at what is under way is good
_LITTLE = 16  # of so many pieces of work, one may begin or end meanwhile
_NONE = np.zeros(0)
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
        self._unasked = 0.0  # those who came without having been told to, of late: fades with each that comes
        self._last = clock()
        self._outlook: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None  # see `_look_out`; when
        self._changes = 0  # pieces of work that have begun or ended since then

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._running

    def begin(self, units: int = 1) -> int:
        """Takes work in; the number that `end` wants."""
        number = next(self._numbers)
        self._came(self._clock())
        self._running[number] = (self._clock(), units)
        self._units += units
        self._changes += 1
        return number

    def end(self, number: int, *, counts: bool = True) -> None:
        """Work has ended, one way or another.

        Args:
            number: of the work.
            counts: whether it says how long such work takes.
        """
        began, units = self._running.pop(number)
        self._units -= units
        self._changes += 1
        if counts:
            self._durations.append(self._clock() - began)

    def wait(self, units: int = 1) -> float:
        """Seconds until so many units more are free, behind those who were told before; notes that it was told.

        Args:
            units: that must end before the caller's work can begin.
        """
        now = self._clock()
        self._came(now)
        # Who calls without waiting would otherwise put everybody off for ever.
        ahead = min(self._awaited, self._units)
        seconds = min(LONGEST, max(SHORTEST, self._until(ahead + units, now)))
        if not self._told or now + seconds >= self._told[-1][0]:
            self._told.append((now + seconds, units))
            self._awaited += units
        return seconds

    def _came(self, now: float) -> None:
        """Notes that somebody came: one who was told to, if any was, or else unasked."""
        self._unasked *= math.exp((self._last - now) / self._window())
        self._last = now
        late = now - self._window()
        while self._told and self._told[0][0] < late:  # they have given up, or went elsewhere: nobody waits behind them
            self._awaited -= self._told.popleft()[1]
        if self._told and self._told[0][0] <= now:
            self._awaited -= self._told.popleft()[1]
        else:
            self._unasked += 1

    def _window(self) -> float:
        return max(1.0, 4 * self._mean())

    def _until(self, units: int, now: float) -> float:
        """Seconds until so many units have ended, as likely as not to be late one time in ten."""
        if not self._running:
            return 0.0
        whole = self._mean()
        rounds, units = divmod(units - 1, self._units)  # more than there are: those that come after them must end too
        moments, expected, doubt = self._look_out(now)
        # Who comes unasked takes room too, a share of it as large as such work takes.
        others = self._unasked / self._window() * whole * -np.expm1(-moments / whole)
        room = expected - others - _QUANTILE * np.sqrt(doubt**2 + others)
        enough = room >= units + 0.5
        # Where it is never likely enough, others come too fast: twice as long as work takes is as good as any wait.
        high = float(moments[enough.argmax()]) if enough.any() else min(float(moments[-1]), 2 * whole)
        return high + rounds * whole

    def _look_out(self, now: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moments from now on, how many units will have ended at each, and its standard deviation.

        One look serves all who are told soon after, while little has changed: many refusals must cost little.
        """
        at, moments, expected, doubt = self._outlook or (-math.inf, _NONE, _NONE, _NONE)
        if now - at > _SOON * self._mean() or self._changes > len(self._running) // _LITTLE:
            began, sizes = self._sample()
            left = self._remaining(now - began)  # [work, sample]
            scale = self._units / sizes.sum()
            moments = np.sort(left, axis=None)[_ranks(left.size)]
            ended = (left[None] <= moments[:, None, None]).mean(axis=2)  # [moment, work]
            expected = scale * (sizes * ended).sum(axis=1)
            doubt = np.sqrt(scale * (sizes**2 * ended * (1 - ended)).sum(axis=1))
            self._outlook, self._changes, at = (now, moments, expected, doubt), 0, now
        return np.maximum(moments - (now - at), 0.0), expected, doubt

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


@functools.cache
def _ranks(count: int) -> np.ndarray:
    """Some of so many sorted moments: all of the first ones, fewer of the later."""
    return np.unique(np.geomspace(1, count, min(count, 64)).astype(int)) - 1
