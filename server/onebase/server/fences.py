"""Training calls of one adapter, and what ends it, keep out of each other's way.

While an adapter is being replaced or deleted, from the look at its version until its name means the other or nothing,
it takes no training call: a step that is answered in that time would be lost with it, or be of a version that the next
adapter of this name has too. Runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from onebase.server.errors import Aborted, DeadlineExceeded
from onebase.server.registry import Entry

_SOON = 0.1  # seconds: what making an adapter durable takes


class Fences:
    """Which adapters are being trained now, and which must not be."""

    def __init__(self) -> None:
        self._calls: Counter[int] = Counter()  # training calls by uid
        self._shut: set[int] = set()
        self._ended: dict[int, asyncio.Future[None]] = {}  # for the one that waits, by uid

    @contextlib.contextmanager
    def training(self, entry: Entry) -> Iterator[None]:
        """A training call: its adapter is not replaced or deleted while the block runs.

        Raises:
            Aborted: ADAPTER_BUSY: that is being done just now.
        """
        if entry.uid in self._shut:
            raise Aborted(
                "ADAPTER_BUSY",
                f"adapter {entry.name!r} is being replaced or deleted by another call, and takes no training calls "
                "until then: look at its version again, and repeat",
                field="adapter",
                retry_after=_SOON,
            )
        self._calls[entry.uid] += 1
        try:
            yield
        finally:
            self._calls[entry.uid] -= 1
            if not self._calls[entry.uid]:
                del self._calls[entry.uid]
                if (ended := self._ended.pop(entry.uid, None)) is not None and not ended.done():
                    ended.set_result(None)

    @contextlib.asynccontextmanager
    async def ending(self, entry: Entry | None, deadline: float | None) -> AsyncIterator[None]:
        """What ends an adapter: the block begins when all its training calls have ended, and none begins in it.

        Args:
            entry: what is replaced or deleted, if there is anything.
            deadline: on time.monotonic's clock.

        Raises:
            DeadlineExceeded: they have not ended by then.
        """
        if entry is None:
            yield
            return
        self._shut.add(entry.uid)
        try:
            if entry.uid in self._calls:
                ended = self._ended[entry.uid] = asyncio.get_running_loop().create_future()
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not (await asyncio.wait((ended,), timeout=left))[0]:
                    raise DeadlineExceeded(
                        "DEADLINE_EXCEEDED", f"the training calls of {entry.name!r} did not end before the deadline"
                    )
            yield
        finally:
            self._ended.pop(entry.uid, None)
            self._shut.discard(entry.uid)
