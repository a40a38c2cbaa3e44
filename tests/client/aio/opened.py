"""An asyncio client of a fake server."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

from onebase.client.aio import AsyncClient
from onebase.client.aio.transport import Transport
from onebase.client.retry import Backoff


@asynccontextmanager
async def opened(server):
    """A client that does not let a test wait long between retries."""
    transport = Transport(server.target, timeout=60.0, backoff=Backoff(first=0.001, longest=0.002))
    async with AsyncClient(transport) as client:
        yield client


async def arrived(server, method, count):
    """Returns when so many calls of the method have come."""
    await asyncio.to_thread(server.wait_for, method, count)


async def cancelled(server):
    """Whether a stream was cancelled, as the server sees it, long before it goes on by itself after a minute."""
    return await asyncio.to_thread(server.cancelled.wait, 20)


async def becomes(condition, seconds=60):
    """Returns when the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
