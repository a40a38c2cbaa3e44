"""A thread that keeps a session alive while its client is busy with something else."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class KeepAlive:
    """Calls a method from a daemon thread, over and over, until it returns False or `stop` is called.

    The method's object is held weakly: when nobody else holds it any more, the thread ends, and so the lease of a
    session that was forgotten runs out.

    Args:
        beat: the bound method; returns whether to go on.
        interval: seconds from one call to the next.
    """

    def __init__(self, beat: Callable[[], bool], interval: float) -> None:
        self._beat = weakref.WeakMethod(beat)
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="onebase-keepalive", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread is still there."""
        return self._thread.is_alive()

    def stop(self, wait: float) -> None:
        """Ends the thread; returns when it has ended, or after `wait` seconds if a call is under way."""
        self._stopped.set()
        self._thread.join(wait)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            beat = self._beat()
            if beat is None or not beat():
                return
            del beat
