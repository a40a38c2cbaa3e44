"""Who waits for a server is told so: once when calls begin to wait, and once when they are answered again."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from onebase.client.errors import OnebaseError, UnavailableError

log = logging.getLogger("onebase.client")

TELL_AFTER_SECONDS = 1.0
"""What passes sooner is told to nobody: a full queue of a moment, a server that restarts quickly."""


@dataclass(frozen=True)
class Wait:
    """Calls wait and are repeated, or are answered again; `str` of it is a sentence for people."""

    target: str
    """The server's host and port."""
    error: OnebaseError
    """What the last attempt ended with; `error.reason` says why, "" where no server answers."""
    longest: float
    """Seconds until the call that waits gives up."""
    over: bool = False
    """Whether it is answered again."""
    waited: float = 0.0
    """Seconds since the first attempt failed."""

    def __str__(self) -> str:
        if self.over:
            return f"{self.target} answers again, after {_time(self.waited)}"
        going_on = f"waiting up to {_time(self.longest)}; the call is kept, and repeated until it is answered"
        if isinstance(self.error, UnavailableError) and not self.error.reason:
            return f"{self.target} does not answer (UNAVAILABLE): {going_on}"
        return f"{self.target} lets calls wait ({self.error.reason or 'no reason'}): {self.error}; {going_on}"


OnWait = Callable[[Wait], None]


def log_wait(wait: Wait) -> None:
    """Tells Python's logging, as onebase.client."""
    log.log(logging.INFO if wait.over else logging.WARNING, "%s", wait)


class Waits:
    """The calls of one client that wait. Any thread may use it.

    Args:
        target: the server's host and port.
        tell: is told when waiting begins, when its reason changes, and when it is over.
        after: seconds of waiting that are told to nobody.
    """

    def __init__(self, target: str, tell: OnWait | None = None, after: float = TELL_AFTER_SECONDS) -> None:
        self._target = target
        self._tell = tell or log_wait
        self._after = after
        self._lock = threading.Lock()
        # Held weakly: a call that was cancelled while it waited says nothing more.
        self._waiting: weakref.WeakKeyDictionary[object, float] = weakref.WeakKeyDictionary()
        self._told: OnebaseError | None = None
        self._since = 0.0

    def waiting(self, call: object, error: OnebaseError, delay: float, longest: float) -> None:
        """A call failed, and is repeated after `delay` seconds, for `longest` at the most."""
        now = time.monotonic()
        with self._lock:
            if not self._waiting:
                self._told = None
            since = self._waiting.setdefault(call, now)
            known = self._told is not None and _kind(self._told) == _kind(error)
            if known or now - since + delay < self._after:
                return
            if self._told is None:
                self._since = since
            self._told = error
            waited = now - self._since
        self._tell(Wait(self._target, error, longest, waited=waited))

    def answered(self, call: object) -> None:
        """A call was answered, whether or not it had to wait."""
        with self._lock:
            if self._waiting.pop(call, None) is None or self._waiting or self._told is None:
                return
            error, self._told = self._told, None
            waited = time.monotonic() - self._since
        self._tell(Wait(self._target, error, 0.0, over=True, waited=waited))

    def gave_up(self, call: object) -> None:
        """A call waits no longer, and its caller is told the error."""
        with self._lock:
            self._waiting.pop(call, None)


def _kind(error: OnebaseError) -> str:
    """What is one and the same to who waits: a server goes away and comes back in several ways."""
    return "away" if isinstance(error, UnavailableError) and error.reason in _ON_THE_WAY else error.reason


_ON_THE_WAY = ("", "DRAINING", "DRAINED", "LOADING", "WORKER_CRASHED")


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
