"""Streams that were ended because nobody read them, and whose clients have not read that either.

A status that goes while a message before it waits may be lost, so it waits too: whoever reads again is told why the
stream has ended. That costs memory, so a tenant has a few such streams, each for a while. The oldest ones, and those
that nobody reads, are left to the transport, which ends with the connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

MOST = 16
"""Such streams of one tenant."""


class Unread:
    """The streams that wait for somebody to read their end.

    Args:
        seconds: for which each may wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._streams: dict[str, deque[asyncio.Event]] = {}

    async def gone(self, tenant: str, writing: asyncio.Future[Any]) -> None:
        """Returns when the message has gone that a stream's end waits for, or shall be waited for no longer."""
        streams, dropped = self._streams.setdefault(tenant, deque()), asyncio.Event()
        streams.append(dropped)
        if len(streams) > MOST:
            streams[0].set()
            streams.popleft()
        given_up = asyncio.ensure_future(dropped.wait())
        try:
            await asyncio.wait((writing, given_up), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            given_up.cancel()
            if dropped in streams:
                streams.remove(dropped)
            if not streams and self._streams.get(tenant) is streams:
                del self._streams[tenant]
