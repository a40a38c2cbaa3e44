"""A task that keeps a session alive while its client is busy with something else."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

Beat = Callable[[], Coroutine[Any, Any, bool]]


class KeepAlive:
    """Awaits a method over and over, from a task of its own, until it returns False or `stop` is called.

    The method's object is held weakly: when nobody else holds it any more, the task ends, and so the lease of a
    session that was forgotten runs out.

    Args:
        beat: the bound method; returns whether to go on.
        interval: seconds from one call to the next.
    """

    def __init__(self, beat: Beat, interval: float) -> None:
        run = _run(weakref.WeakMethod(beat), interval)
        self._task = asyncio.get_running_loop().create_task(run, name="onebase-keepalive")

    @property
    def running(self) -> bool:
        """Whether the task is still there."""
        return not self._task.done()

    async def stop(self, wait: float) -> None:
        """Cancels the task and a call that it has under way; returns when it has ended, or after `wait` seconds."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=wait)


async def _run(beat: weakref.WeakMethod[Beat], interval: float) -> None:
    while True:
        await asyncio.sleep(interval)
        method = beat()
        if method is None or not await method():
            return
        del method
