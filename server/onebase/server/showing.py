"""What may be shown of steps that can still be lost: nothing.

With `--durability step` a number that was ever seen is never another's. A step is made before it is durable, and a full
disk may keep it from becoming so: until it is, who reads its adapter waits, or is told why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onebase.server.errors import OnebaseError, Unavailable
from onebase.server.registry import Entry
from onebase.server.tracks import Track


class Showing:
    """What may be shown of adapters that outlive the process.

    Args:
        tracks: how far they are durable, by uid; others may always be shown.
        careful: whether a version is seen by nobody before it is durable.
    """

    def __init__(self, tracks: Mapping[int, Track], *, careful: bool) -> None:
        self._tracks = tracks
        self._careful = careful

    async def seen(self, versions: Mapping[int, int]) -> None:
        """Returns when these versions (uid → version) may be shown.

        Raises:
            OnebaseError: one of them may not, and what keeps it from being durable.
        """
        for uid, version in versions.items():
            track = await self._at_rest(uid, version)
            if track is not None and track.safe < version:
                raise _not_durable(track)

    async def shown(self, entries: Sequence[Entry]) -> list[Entry]:
        """Adapters at the newest versions that may be shown."""
        found = []
        for entry in entries:
            track, facts = await self._at_rest(entry.uid, entry.facts.version), entry.facts
            if track is not None and track.safe < facts.version:
                facts = replace(facts, version=track.safe)
            found.append(replace(entry, facts=facts))
        return found

    async def _at_rest(self, uid: int, version: int) -> Track | None:
        """An adapter's track when no step to this version is on its way to the disk; None where any may be shown."""
        if not self._careful:
            return None
        while (track := self._tracks.get(uid)) is not None and track.steps_under_way and track.safe < version:
            await track.progress.wait()
        return track


def _not_durable(track: Track) -> OnebaseError:
    if isinstance(track.failure, OnebaseError):
        return track.failure.again()
    return Unavailable("NOT_DURABLE_YET", "the adapter's newest step is not durable yet: try again", retry_after=1.0)
