"""Adapters' files on their way: how many each tenant may have under way, and how much scratch room they may take.

An upload is counted by what its header declares, before a byte of it is written; a copy by what lies there; a download
by what the adapter's parameters need. Whoever finds no room is told to come again. Runs on the event loop's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from onebase.server.errors import ResourceExhausted
from onebase.server.identity import caller

_RETRY_SECONDS = 2.0


class Transfers:
    """The scratch room of one server.

    Args:
        whole: bytes that all transfers may take together.
        share: bytes of them that one tenant's may take.
        most: transfers that one tenant may have under way.
    """

    def __init__(self, whole: int, share: int, most: int) -> None:
        self._whole = whole
        self._share = share
        self._most = most
        self._bytes: Counter[str] = Counter()
        self._open: Counter[str] = Counter()

    def take(self, wanted: int) -> Callable[[], None]:
        """Takes room for a transfer of the caller's; what is returned gives it back, once.

        Args:
            wanted: bytes; what is more than a tenant's share counts as all of it, and so goes alone.

        Raises:
            ResourceExhausted: QUOTA_TRANSFERS, SCRATCH_FULL.
        """
        tenant = caller().tenant
        wanted = min(wanted, self._share)
        if self._open[tenant] >= self._most:
            raise ResourceExhausted(
                "QUOTA_TRANSFERS",
                f"{self._open[tenant]} uploads, downloads and loads of tenant {tenant!r} are under way, and it may "
                f"have {self._most}: wait for some of them",
                retry_after=_RETRY_SECONDS,
            )
        mine, there = self._bytes[tenant], self._bytes.total()
        if mine + wanted > self._share or there + wanted > self._whole:
            whose, taken, limit = (
                (f"those of tenant {tenant!r}", mine, self._share)
                if mine + wanted > self._share
                else ("all of them", there, self._whole)
            )
            raise ResourceExhausted(
                "SCRATCH_FULL",
                f"uploads, downloads and loads under way take {taken} bytes, {wanted} more are wanted, and {whose} may "
                f"take {limit}: wait for some of them",
                retry_after=_RETRY_SECONDS,
            )
        self._bytes[tenant] += wanted
        self._open[tenant] += 1
        given_back = False

        def give_back() -> None:
            nonlocal given_back
            if not given_back:
                given_back = True
                self._end(tenant, wanted)

        return give_back

    def _end(self, tenant: str, wanted: int) -> None:
        self._bytes[tenant] -= wanted
        self._open[tenant] -= 1
        if not self._open[tenant]:  # so that tenants of long ago leave nothing
            del self._open[tenant], self._bytes[tenant]
