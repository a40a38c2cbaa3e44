"""What the event loop has others wait for: the store on one thread, where checkpoints lie on several.

What must not stop half-way goes on when its call is cancelled, and the end of the server waits for it. Knows nothing of
adapters.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from onebase.server import failpoints
from onebase.server.calls import unbroken
from onebase.server.errors import disk_full, drained

log = logging.getLogger(__name__)

R = TypeVar("R")

_STORAGE_THREADS = 4
"""So many checkpoints are on their way to or from where they lie."""


class Errands:
    """Work beside the event loop."""

    def __init__(self) -> None:
        self._store = ThreadPoolExecutor(1, thread_name_prefix="onebase-store")
        self._storage = ThreadPoolExecutor(_STORAGE_THREADS, thread_name_prefix="onebase-storage")
        self._asides: set[asyncio.Future[None]] = set()

    async def store(self, work: Callable[[], R]) -> R:
        """Runs what waits for the store, after all that was given to it before.

        Raises:
            OnebaseError: what an OSError means to a client.
        """

        def reached() -> R:
            failpoints.hit("store")
            return work()

        return await _run(self._store, reached)

    async def storage(self, work: Callable[[], R]) -> R:
        """Runs what waits for where checkpoints lie, beside other such work.

        Raises:
            OnebaseError: what an OSError means to a client, and the work's own.
        """
        return await _run(self._storage, work)

    async def through(self, work: Coroutine[Any, Any, None]) -> None:
        """Does what must not stop half-way; the end of the server waits for it too."""
        await unbroken(self.aside(work))

    def aside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins what the end of the server waits for, if nobody else does."""
        task = asyncio.get_running_loop().create_task(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)
        task.add_done_callback(_log_failure)
        return task

    async def ended(self) -> None:
        """Returns when nothing is under way aside."""
        while self._asides:
            await asyncio.wait(tuple(self._asides))

    async def close(self) -> None:
        """Ends the threads, when they have done what they were given."""
        await asyncio.to_thread(self._storage.shutdown)
        await asyncio.to_thread(self._store.shutdown)


async def _run(threads: Executor, work: Callable[[], R]) -> R:
    def guarded() -> R:
        try:
            return work()
        except Exception:
            raise
        except BaseException as error:  # what ends a thread must not end the event loop, which would raise it too
            raise RuntimeError(f"a thread was ended by {error!r}") from error

    try:
        begun = asyncio.get_running_loop().run_in_executor(threads, guarded)
    except RuntimeError:  # the threads have ended: a call that was between two of its steps when the server stopped
        raise drained() from None
    try:
        return await begun
    except OSError as error:
        raise disk_full(error) from error


def _log_failure(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("the state directory could not be written: %s", error)
