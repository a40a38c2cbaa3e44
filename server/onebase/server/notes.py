"""Small changes of the store that nobody computes anew: each is written at once, and one that failed until it is.

Of one key the newest change alone counts. Knows nothing of what they change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

Change = Callable[[], None]
"""Runs on the store's thread."""

log = logging.getLogger(__name__)


class Notes:
    """Changes under way to the store.

    Args:
        write: has the store's thread do a change, after all that was given to it before.
    """

    def __init__(self, write: Callable[[Change], Awaitable[None]]) -> None:
        self._write = write
        self._unwritten: dict[str, Change] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    def note(self, key: str, change: Change) -> None:
        """Begins a change; `written` waits for it."""
        self._unwritten[key] = change
        self._begin(key, change)

    async def written(self, key: str) -> None:
        """Returns when all that was noted before has been tried, and what was noted of this key is in the store.

        Raises:
            OnebaseError: it is not. It is tried again: by the next who waits, and by `again`.
        """
        noted = self._unwritten.get(key)
        if self._under_way:
            await asyncio.wait(tuple(self._under_way))
        if noted is not None:
            await self._one(key, noted)

    def again(self) -> None:
        """Begins anew what has failed."""
        if not self._under_way:
            for key, change in self._unwritten.items():
                self._begin(key, change)

    def _begin(self, key: str, change: Change) -> None:
        task = asyncio.get_running_loop().create_task(self._one(key, change))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        task.add_done_callback(_log_failure)

    async def _one(self, key: str, change: Change) -> None:
        if self._unwritten.get(key) is not change:  # it is written, or a newer one is under way
            return
        await self._write(change)
        if self._unwritten.get(key) is change:
            del self._unwritten[key]


def _log_failure(done: asyncio.Task[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("a session could not be written into the state directory: %s", error)
