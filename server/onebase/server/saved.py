"""How many bytes lie in tenants' own directories under the roots, and how many more may come there.

What lies there is counted anew for each save: its tenant may write and delete there in other ways too. A directory is
made elsewhere and moved in, so its bytes are known before they are a tenant's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

from onebase.server.config import Quota
from onebase.server.errors import ResourceExhausted
from onebase.server.spool import elsewhere
from onebase.server.walls import Place, bytes_of


class SavedQuotas:
    """What each tenant, and all of them together, may have saved.

    Args:
        roots: the directories that hold the tenants'.
        tenant: what each tenant may have.
        whole: what all of them may have together. Two that save at the same moment may go over it by what they save.
    """

    def __init__(self, roots: Sequence[Path], tenant: Quota, whole: Quota) -> None:
        self._roots = tuple(roots)
        self._tenant = tenant.saved_bytes
        self._whole = whole.saved_bytes
        self._saving: dict[str, asyncio.Lock] = {}
        self._waiting: Counter[str] = Counter()

    async def check(self, place: Place) -> None:
        """Refuses a save before it is begun, where there is no room for a single byte.

        Raises:
            ResourceExhausted: QUOTA_SAVED_BYTES.
        """
        if self._tenant or self._whole:
            await elsewhere(lambda: self._check(place, 1))

    async def take(self, place: Place, made: Path, move: Callable[[], None]) -> None:
        """Moves what was made to its place, if there is room for it.

        Raises:
            ResourceExhausted: QUOTA_SAVED_BYTES; nothing was moved.
            OnebaseError: what moving it raises.
        """
        if not (self._tenant or self._whole):
            await elsewhere(move)
            return

        def moved() -> None:
            self._check(place, bytes_of(made))
            move()

        async with self._one_after_the_other(place.tenant):
            await elsewhere(moved)

    def _check(self, place: Place, wanted: int) -> None:
        freed = place.bytes_below()
        for whose, limit, homes in (
            (f"tenant {place.tenant!r}", self._tenant, [place.tenant]),
            ("all tenants together", self._whole, None),
        ):
            if not limit:
                continue
            there = sum(one.bytes_below() for one in self._homes(homes)) - freed
            if there + wanted > limit:
                raise ResourceExhausted(
                    "QUOTA_SAVED_BYTES",
                    f"{there} bytes are saved besides what is at path {place.shown!r}, {wanted} are wanted there, and "
                    f"{whose} may have {limit}: save over an older one, or have some deleted on the server's disk",
                    field="path",
                )

    def _homes(self, names: Sequence[str] | None) -> Iterator[Place]:
        """The directories of these names in the roots; None is all but the server's own, whose name has a dot."""
        for root in self._roots:
            with os.scandir(root) as entries:
                all_there = [one.name for one in entries if one.is_dir(follow_symlinks=False) and one.name[0] != "."]
            there = all_there if names is None else names
            yield from (Place(root, name, (), name) for name in there)

    @contextlib.asynccontextmanager
    async def _one_after_the_other(self, tenant: str) -> AsyncIterator[None]:
        """Of one tenant: what is counted must still be what there is when the next one comes in."""
        self._waiting[tenant] += 1
        try:
            async with self._saving.setdefault(tenant, asyncio.Lock()):
                yield
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._saving[tenant]
