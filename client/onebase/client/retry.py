"""When a failed call is sent again, and after how long: pure, without a clock."""

from __future__ import annotations

from dataclasses import dataclass

from onebase.client.errors import OnebaseError, ResourceExhaustedError, UnavailableError


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with jitter, in seconds."""

    first: float = 0.1
    """Longest delay before the first retry; with less time than this left, there is none."""
    factor: float = 2.0
    """Growth from one retry to the next."""
    longest: float = 2.0
    """Longest delay before any retry, besides what the server asks for."""

    def delay(self, failure: OnebaseError, attempt: int, remaining: float, draw: float) -> float | None:
        """Seconds to wait before a call that may be repeated is sent again, or None to give up.

        Only two failures pass by waiting: UNAVAILABLE, and RESOURCE_EXHAUSTED where the server says how long.

        Args:
            failure: what the last attempt ended with.
            attempt: how many attempts failed before it.
            remaining: seconds until the call's deadline. At least half of what the server leaves of it is kept for
                the next attempt.
            draw: a random number in [0, 1), so that clients that failed together do not return together.
        """
        asked = failure.retry_after
        if not (
            isinstance(failure, UnavailableError) or (isinstance(failure, ResourceExhaustedError) and asked is not None)
        ):
            return None
        slack = remaining - (asked or 0.0)
        if slack < self.first:
            return None
        backoff = min(self.longest, self.first * self.factor ** min(attempt, 64)) * (0.5 + draw / 2)
        return (asked or 0.0) + min(backoff, slack / 2)
