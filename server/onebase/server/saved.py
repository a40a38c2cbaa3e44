"""How many bytes lie in tenants' own directories under the roots, and how many more may come there.

What lies there is counted anew for each save: its tenant may write and delete there in other ways too. A directory is
made elsewhere and moved in, so its bytes are known before they are a tenant's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onebase.server.config import Quota
from onebase.server.errors import ResourceExhausted
from onebase.server.locks import TenantLocks
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
        self._saving = TenantLocks()

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

        async with self._saving.held(place.tenant):  # what was counted is still what there is
            await elsewhere(moved)

    def _check(self, place: Place, wanted: int) -> None:
        freed = place.bytes_below()
        for whose, limit, tenant in (
            (f"tenant {place.tenant!r}", self._tenant, place.tenant),
            ("all tenants together", self._whole, None),
        ):
            if limit and (there := sum(home.bytes_below() for home in self._homes(tenant)) - freed) + wanted > limit:
                raise ResourceExhausted(
                    "QUOTA_SAVED_BYTES",
                    f"{there} bytes are saved besides what is at path {place.shown!r}, {wanted} are wanted there, and "
                    f"{whose} may have {limit}: save over an older one, or have some deleted on the server's disk",
                    field="path",
                )

    def _homes(self, tenant: str | None) -> Iterator[Place]:
        """A tenant's directories in the roots; None is everybody's."""
        for root in self._roots:
            yield from (Place(root, name, (), name) for name in ([tenant] if tenant else _tenants_in(root)))


def _tenants_in(root: Path) -> list[str]:
    """The directories in a root but the server's own, whose name has a dot."""
    with os.scandir(root) as entries:
        return [one.name for one in entries if one.is_dir(follow_symlinks=False) and one.name[0] != "."]
