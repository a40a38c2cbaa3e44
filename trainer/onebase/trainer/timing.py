"""How long things take."""

from __future__ import annotations

import time


class Stopwatch:
    """Tells the seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the watch was made."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
