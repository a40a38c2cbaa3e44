"""The disks that clients have adapters read from and written to, each caller as far as it may go.

The operator's paths are used as they are. A tenant's directory is copied into a scratch directory and read there; what
it is to hold is written into one on the same file system, and moved: `walls` says why.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from onebase.server.config import ServerConfig
from onebase.server.errors import disk_full
from onebase.server.identity import OPERATOR, caller
from onebase.server.paths import Roots
from onebase.server.saved import SavedQuotas
from onebase.server.scratch import Scratch, of_this_user
from onebase.server.spool import Spool, elsewhere, shown_as
from onebase.server.transfers import Transfers
from onebase.server.walls import saved_at

_IN_ROOT = ".onebase"
"""Where scratch directories lie in a root. No tenant's name begins with a dot."""


class Disks:
    """What one server may read and write for its clients.

    Args:
        config: its settings.
    """

    def __init__(self, config: ServerConfig) -> None:
        walled = config.security.tokens is not None
        self.roots = Roots(config.roots, config.shared_roots)
        self.scratch = Scratch(of_this_user())
        """Of uploads, downloads and copies: not in the state's directory, whose disk may be full."""
        self._in_roots = {root.resolve(): Scratch(root.resolve() / _IN_ROOT) for root in config.roots if walled}
        self._saved = SavedQuotas(tuple(self._in_roots), config.tenant_quota, config.quota)
        self._limit = config.limits.max_upload_bytes
        whole, most = self._limit * config.limits.scratch_uploads, config.limits.max_transfers_per_tenant
        # Where there are no tokens, everybody is one tenant, and has the room of all.
        self.transfers = (
            Transfers(whole, max(self._limit, whole // 4), most) if walled else Transfers(whole, whole, 4 * most)
        )
        """Of files on their way to and from the scratch directory."""

    def sweep(self) -> None:
        """Deletes what servers that were killed have left.

        Raises:
            ConfigError: a directory is not this user's own.
            OSError: one cannot be made.
        """
        for scratch in (self.scratch, *self._in_roots.values()):
            scratch.sweep()

    def close(self) -> None:
        """Deletes what this server has left."""
        for scratch in (self.scratch, *self._in_roots.values()):
            scratch.close()

    @contextlib.asynccontextmanager
    async def reading(self, path: str) -> AsyncIterator[tuple[Path, str]]:
        """A directory to load an adapter from inside the block, and where it comes from, for people.

        Raises:
            OnebaseError: the caller may not read it.
        """
        who, roots = caller(), self.roots
        if who.tenant == OPERATOR:
            folder = roots.readable(path)
            yield folder, str(folder)
        elif (shared := roots.shared(path)) is not None:
            yield shared, str(shared)
        else:
            place = roots.place(path, who.tenant)
            there = await elsewhere(place.bytes_there)
            limit = min(there, self._limit)  # what grows meanwhile is refused
            with Spool(self.scratch, self.transfers.take(limit)).used() as folder, shown_as(folder, path):
                await elsewhere(lambda: place.copy_to(folder, limit))
                yield folder, str(place.path)

    async def saved(self, path: str, stamp: str) -> tuple[Path, int, int] | None:
        """What a call of this stamp has saved at a path: where, its version and its bytes; None if it is not there.

        Raises:
            OnebaseError: the caller may not write there.
        """
        who = caller()
        if who.tenant == OPERATOR:
            final = self.roots.writable(path)
            found = await elsewhere(lambda: saved_at(final, stamp))
        else:
            place = self.roots.own(path, who.tenant)
            final, found = place.path, await elsewhere(lambda: place.saved(stamp))
        return None if found is None else (final, *found)

    @contextlib.asynccontextmanager
    async def writing(self, path: str, *, overwrite: bool) -> AsyncIterator[tuple[Path, Path]]:
        """Where to write an adapter inside the block, and where it is behind it.

        Raises:
            OnebaseError: the caller may not write there.
        """
        who = caller()
        if who.tenant == OPERATOR:
            final = self.roots.writable(path)
            yield final, final
            return
        place = self.roots.own(path, who.tenant)
        await elsewhere(lambda: place.check_free(overwrite=overwrite))
        await self._saved.check(place)
        try:
            folder = await elsewhere(self._in_roots[place.root].fresh)
        except OSError as error:
            raise disk_full(error) from error
        try:
            made = folder / "adapter"
            with shown_as(made, path):
                yield made, place.path
                await self._saved.take(place, made, lambda: place.take(made, overwrite=overwrite))
        finally:
            await elsewhere(lambda: shutil.rmtree(folder, ignore_errors=True))
