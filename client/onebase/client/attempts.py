"""One call's attempts up to its deadline: arithmetic with a clock, which neither sends nor sleeps."""

from __future__ import annotations

import random
import time

from onebase.client.errors import DeadlineExceededError, OnebaseError
from onebase.client.retry import Backoff
from onebase.client.waits import Waits


class Attempts:
    """Counts a call's failed attempts; its clock starts when it is made."""

    def __init__(self, backoff: Backoff, *, repeatable: bool, seconds: float, waits: Waits | None = None) -> None:
        self._backoff = backoff
        self._repeatable = repeatable
        self._deadline = time.monotonic() + seconds
        self._waits = waits
        self._failed = 0
        self._last: OnebaseError | None = None

    def remaining(self) -> float:
        """Seconds until the deadline; at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def delay_after(self, failure: OnebaseError) -> float:
        """Seconds to wait before the next attempt; raises the failure if there is to be none."""
        delay = None
        if self._repeatable:
            delay = self._backoff.delay(failure, self._failed, self.remaining(), random.random())
        if delay is None:
            # An attempt that the deadline cut short hides why it was not the first one.
            if self._waits is not None and self._failed:
                self._waits.gave_up(self)
            hidden = self._last if isinstance(failure, DeadlineExceededError) else None
            raise (hidden or failure) from None
        self._last = failure
        self._failed += 1
        if self._waits is not None:
            self._waits.waiting(self, failure, delay, self.remaining())
        return delay

    def answered(self) -> None:
        """The call was answered; whoever was told that it waits is told that, too."""
        if self._waits is not None and self._failed:
            self._waits.answered(self)
