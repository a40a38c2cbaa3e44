"""When a failed call is sent again, and after how long: pure, without a clock."""

from __future__ import annotations

from dataclasses import dataclass

from onebase.client.errors import CancelledError, OnebaseError, ResourceExhaustedError, UnavailableError


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
        return (asked or 0.0) + min(self.pause(attempt, draw), slack / 2)

    def pause(self, attempt: int, draw: float) -> float:
        """Seconds of backoff after so many failures before; `draw` as above."""
        return min(self.longest, self.first * self.factor ** min(attempt, 64)) * (0.5 + draw / 2)


class Pauses:
    """How long to wait before a stream that broke is opened again; it neither sends nor sleeps.

    Args:
        backoff: grows from one stream that said nothing to the next.
        longest: seconds of the longest wait.
    """

    def __init__(self, backoff: Backoff, longest: float) -> None:
        self._backoff = backoff
        self._longest = longest
        self._failed = 0

    def heard(self) -> None:
        """The stream lives."""
        self._failed = 0

    def after(self, failure: OnebaseError, draw: float) -> float:
        """Seconds to wait after a failure, long where waiting alone does not cure it; `draw` as for `Backoff.delay`."""
        if not isinstance(failure, UnavailableError | CancelledError):
            return self._longest
        pause = (failure.retry_after or 0.0) + self._backoff.pause(self._failed, draw)
        self._failed += 1
        return min(pause, self._longest)
