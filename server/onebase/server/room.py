"""What adapters a tenant, and all of them together, may have, while more of them are being made.

Nobody waits for another tenant's adapter that takes long to make: its place is booked meanwhile, and so are its bytes
as soon as they are known. Until then more than one may be made of what is left of everybody's bytes; who is done too
late for them is refused, and its memory freed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field

from onebase.server.config import Quota
from onebase.server.errors import ResourceExhausted
from onebase.server.jobs import AdapterFacts
from onebase.server.locks import TenantLocks
from onebase.server.registry import Entry, Registry

TRAINED_COPIES = 4
"""Copies of a trained adapter's parameters that its training needs: weights, gradients, two moments."""


@dataclass(eq=False)
class Room:
    """For one adapter that is being made."""

    quotas: AdapterQuotas
    owner: str
    places: int
    """That it takes: none if another one goes for it."""
    most: int | None = None
    """Bytes that it may take, as far as is known before it is made; None is any."""
    bytes: int = 0
    """That it takes, once that is known."""

    def made(self, facts: AdapterFacts) -> None:
        """The engine has it.

        Raises:
            ResourceExhausted: QUOTA_ADAPTER_BYTES: others that were made meanwhile took what there was.
        """
        self.quotas.check_made(self, _bytes(facts))


@dataclass
class AdapterQuotas:
    """What adapters each tenant, and all of them together, may have. Runs on the event loop's thread."""

    registry: Registry
    tenant: Quota = field(default_factory=Quota)
    whole: Quota = field(default_factory=Quota)
    _booked: list[Room] = field(default_factory=list)
    _making: TenantLocks = field(default_factory=TenantLocks)

    @contextlib.asynccontextmanager
    async def room(self, owner: str, replaced: Entry | None = None) -> AsyncIterator[Room]:
        """Room for one adapter more, while it is being made.

        Args:
            owner: the tenant whose it will be.
            replaced: the adapter that goes when it has come; until then both are there.

        Raises:
            ResourceExhausted: QUOTA_ADAPTERS.
        """
        async with self._one_after_the_other(owner):
            room = Room(self, owner, int(replaced is None))
            self._check_places(room)
            room.most = min((quota - there for _, quota, there in self._bytes_of(room)), default=None)
            if room.most is not None:
                room.most = max(0, room.most)
            self._booked.append(room)
            try:
                yield room
            finally:
                self._booked.remove(room)

    @contextlib.asynccontextmanager
    async def _one_after_the_other(self, owner: str) -> AsyncIterator[None]:
        """Of one tenant, where its bytes are limited: what is left for the next one is known when one is made."""
        if not (self.tenant.adapter_bytes or self.whole.adapter_bytes):
            yield
            return
        async with self._making.held(owner):
            yield

    def check_made(self, room: Room, size: int) -> None:
        """As `Room.made`."""
        for whose, quota, there in self._bytes_of(room):
            if there + size > quota:
                raise ResourceExhausted(
                    "QUOTA_ADAPTER_BYTES",
                    f"it takes {size} bytes when it trains, and others that were made meanwhile left "
                    f"{max(0, quota - there)} of the {quota} that {whose} may have: delete one first",
                )
        room.bytes = size

    def _check_places(self, room: Room) -> None:
        for whose, quota, tenant in self._limits(room.owner):
            booked = sum(other.places for other in self._others(room, tenant))
            count = len(self.registry.of_tenant(tenant)) + booked
            if quota.adapters and count + room.places > quota.adapters:
                raise ResourceExhausted(
                    "QUOTA_ADAPTERS",
                    f"{count} adapters are there, and {whose} may have {quota.adapters}: delete one first",
                )

    def _bytes_of(self, room: Room) -> Iterator[tuple[str, int, int]]:
        """Whose bytes are limited, to how many, and how many are taken, but for those of this room."""
        for whose, quota, tenant in self._limits(room.owner):
            if quota.adapter_bytes:
                there = sum(_bytes(one.facts) for one in self.registry.of_tenant(tenant))
                yield whose, quota.adapter_bytes, there + sum(other.bytes for other in self._others(room, tenant))

    def _limits(self, owner: str) -> tuple[tuple[str, Quota, str | None], ...]:
        return (f"tenant {owner!r}", self.tenant, owner), ("all clients together", self.whole, None)

    def _others(self, room: Room, tenant: str | None) -> Iterable[Room]:
        return (one for one in self._booked if one is not room and tenant in (None, one.owner))


def _bytes(facts: AdapterFacts) -> int:
    """What an adapter takes when it trains, as it was counted when it was let in."""
    return facts.parameter_count * 4 * (TRAINED_COPIES if facts.kind.trained else 1)
