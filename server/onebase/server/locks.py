"""Locks by tenant: what one tenant does is done one after the other, and no other tenant waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator


class TenantLocks:
    """A lock of each tenant that uses one now; of the others nothing is kept. Runs on the event loop's thread."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def held(self, tenant: str) -> AsyncIterator[None]:
        """Holds a tenant's lock for as long as the block runs."""
        self._users[tenant] += 1
        try:
            async with self._locks.setdefault(tenant, asyncio.Lock()):
                yield
        finally:
            self._users[tenant] -= 1
            if not self._users[tenant]:
                del self._users[tenant], self._locks[tenant]
