"""Which adapters leave device memory, and when: those that nobody has used for long, or the least recently used ones
while all together take more than they may, or those whose trainer has vanished.

Only what is durable leaves, so it is made durable first. Whether anything needs an adapter just then, the worker knows,
and it does not let such a one go; the next look tries again. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from onebase.server.calls import perform, settle
from onebase.server.errors import OnebaseError
from onebase.server.jobs import AdapterFacts, DescribeAdaptersJob, EvictAdapterJob
from onebase.server.ports import WorkerLike

log = logging.getLogger(__name__)

SHORTEST_IDLE = 1.0
"""Seconds that an adapter stays after its last use, whatever others take: between two calls of a client."""

_AGAIN_SECONDS = 60.0
"""Seconds after which an adapter is tried again that could not be made durable."""


class Checkpoints(Protocol):
    """Where adapters go."""

    def holds(self, uid: int) -> bool:
        """Whether this adapter is kept here at all."""
        ...

    async def make_durable(self, uid: int) -> int | None:
        """Makes an adapter's newest version durable and returns it; None if a newer one was made meanwhile.

        Raises:
            OnebaseError: it is not durable.
        """
        ...

    def opened(self, uid: int, loop: asyncio.AbstractEventLoop) -> AbstractContextManager[Path]:
        """A directory with an adapter's newest durable version, all of it what was written. For another thread.

        Raises:
            OnebaseError: it is damaged, gone or out of reach.
        """
        ...


class Residency:
    """Evicts adapters.

    Args:
        worker: has them.
        checkpoints: where they go.
        idle_seconds: evicts what was not used for so long; 0 never does.
        budget: bytes of device memory for all adapters; 0 is no limit.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        worker: WorkerLike,
        checkpoints: Checkpoints,
        idle_seconds: float,
        budget: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.told: Callable[[AdapterFacts], None] = lambda _facts: None
        """Is told what the worker says of adapters."""
        self._worker = worker
        self._checkpoints = checkpoints
        self._idle_seconds = idle_seconds
        self._budget = budget
        self._clock = clock
        self._leaving: set[int] = set()  # their trainers vanished
        self._not_before: dict[int, float] = {}
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._look: asyncio.Task[bool] | None = None

    @property
    def active(self) -> bool:
        """Whether adapters leave that nobody has abandoned."""
        return self._idle_seconds > 0 or self._budget > 0

    def tick(self) -> None:
        """Is called about once a second."""
        if (self.active or self._leaving) and self._look is None:
            self._look = asyncio.get_running_loop().create_task(self._logged(self.look()))
            self._look.add_done_callback(lambda _: setattr(self, "_look", None))

    def abandoned(self, uid: int) -> None:
        """Evicts an adapter as soon as it is durable and nothing needs it, unless a step of it is made before that."""
        self._leaving.add(uid)
        self._begin(uid)

    def stepped(self, uid: int) -> None:
        """Its trainer is back, or has never been away."""
        self._leaving.discard(uid)

    async def look(self) -> None:
        """Asks the worker, and begins to evict what should leave.

        Raises:
            OnebaseError: the worker's.
        """
        facts = list((await perform(self._worker, DescribeAdaptersJob(), None, None)).values())
        for one in facts:
            self.told(one)
        there = [one for one in facts if one.resident]
        self._leaving &= {one.uid for one in there}
        over = sum(map(_bytes, there)) - self._budget if self._budget else 0
        for one in sorted(there, key=lambda one: -one.idle_seconds):
            idle = 0 < self._idle_seconds <= one.idle_seconds
            crowded = over > 0 and one.idle_seconds >= SHORTEST_IDLE
            wanted = idle or crowded or one.uid in self._leaving
            if wanted and not one.pending_gradients and self._checkpoints.holds(one.uid):
                over -= _bytes(one)
                self._begin(one.uid)

    async def rest(self, uid: int) -> None:
        """Evicts an adapter that has just come from where it goes, if nothing needs it; of no effect otherwise."""
        if self.active:
            await self._logged(self._evict(uid))

    async def close(self) -> None:
        """Returns when nothing is under way. The worker must have ended all calls."""
        while self._look is not None or self._under_way:
            await asyncio.wait((*self._under_way.values(), *filter(None, (self._look,))))

    def _begin(self, uid: int) -> None:
        if uid not in self._under_way and self._clock() >= self._not_before.get(uid, 0.0):
            task = self._under_way[uid] = asyncio.get_running_loop().create_task(self._leave(uid))
            task.add_done_callback(lambda _: self._under_way.pop(uid))

    async def _leave(self, uid: int) -> None:
        self._not_before.pop(uid, None)
        if not await self._logged(self._evict(uid)):
            self._not_before[uid] = self._clock() + _AGAIN_SECONDS

    async def _evict(self, uid: int) -> None:
        version = await self._checkpoints.make_durable(uid)
        if version is None:
            return
        loop = asyncio.get_running_loop()
        job = EvictAdapterJob(adapter=uid, version=version, open=lambda: self._checkpoints.opened(uid, loop))
        facts = await settle(self._worker, job)
        self.told(facts)
        if not facts.resident:
            self._leaving.discard(uid)
            log.info("adapter uid %d, version %d, left device memory", uid, version)

    async def _logged(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether it succeeded. Who waits for nothing is not told errors; the next look does it again."""
        try:
            await work
        except OnebaseError as error:
            log.info("adapters stay in device memory: %s", error)
            return False
        except Exception:
            log.exception("adapters stay in device memory")
            return False
        return True


def _bytes(facts: AdapterFacts) -> int:
    memory = facts.memory
    return memory.weights + memory.gradients + memory.optimizer + memory.old_versions
