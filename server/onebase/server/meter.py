"""Rates over the last seconds."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class Meter:
    """Counts per second over a window. Any thread may count, and any may ask.

    Args:
        window: seconds to look back.
        clock: seconds that only grow.
    """

    def __init__(self, window: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._lock = threading.Lock()  # one thread counts, another asks
        self._marks: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, count: int) -> None:
        """Counts something that happened now."""
        with self._lock:
            self._marks.append((self._clock(), count))
            self._total += count
            self._forget()

    def rate(self) -> float:
        """Per second, over the window."""
        with self._lock:
            self._forget()
            return self._total / self._window

    def _forget(self) -> None:
        oldest = self._clock() - self._window
        while self._marks and self._marks[0][0] < oldest:
            self._total -= self._marks.popleft()[1]
