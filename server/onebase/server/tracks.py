"""How far an adapter is durable. Knows neither the event loop nor the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from onebase.server.jobs import AdapterKind
from onebase.server.registry import Entry
from onebase.server.store import MAX_RESPONSES, AdapterRow, ResponseRow


@dataclass(eq=False)
class Track:
    """How far one adapter is durable."""

    row: AdapterRow
    """What the store shall know of it, but for the versions set aside."""
    durable: int
    """The newest version that is."""
    newest: int
    """The newest version that there is."""
    reserved: int
    """The highest version that may be made before another note in the store."""
    since: float = 0.0
    """When the first step was made that is not durable; or when saving it last failed."""
    records: list[tuple[int, ResponseRow]] = field(default_factory=list)
    """Answers of steps, by version, that are not durable."""
    safe: int = 0
    """The newest version that means the same numbers after a kill: durable, or made of a checkpoint at the start."""
    saving: asyncio.Task[None] | None = None
    failure: BaseException | None = None
    """Why the newest version is not durable, where saving it was tried."""
    committed: dict[int, int] = field(default_factory=dict)
    """Which snapshot of a version is in the store: the last by the engine's count."""
    steps_under_way: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    """Is set, and another one made, when a step is durable or has ended."""

    @property
    def key(self) -> str:
        """Its adapter's name among those of all tenants."""
        return self.row.name

    @property
    def kind(self) -> AdapterKind:
        """What its adapter is for."""
        return AdapterKind(self.row.kind)

    def stepped(self, version: int, record: ResponseRow | None, now: float) -> None:
        """Takes in that a version was made, and what that was answered."""
        if self.newest == self.durable:
            self.since = now
        self.newest = max(self.newest, version)
        if record is not None:
            self.records.append((version, record))
            del self.records[:-MAX_RESPONSES]  # the store would not keep more of them either

    def due(self, version: int) -> Sequence[ResponseRow]:
        """The answers that belong to a checkpoint of this version."""
        return [record for made, record in self.records if made <= version]

    def saved(self, version: int, now: float) -> None:
        """Takes in that a checkpoint of this version was committed, with what was due."""
        self.durable = max(self.durable, version)
        self.safe = max(self.safe, version)
        self.since = now
        self.failure = None
        self.records = [(made, record) for made, record in self.records if made > version]
        self.go_on()

    def failed(self, error: BaseException, now: float) -> None:
        """Takes in that a checkpoint could not be made."""
        self.since = now
        self.failure = error
        self.go_on()

    def overtaken(self, version: int, snapshot: int) -> bool:
        """Whether a later snapshot of this version is in the store already."""
        return self.committed.get(version, snapshot) > snapshot

    def put(self, version: int, snapshot: int) -> None:
        """Takes in that a snapshot of a version is in the store."""
        self.committed = {version: snapshot, **{v: s for v, s in self.committed.items() if v > version}}

    def go_on(self) -> None:
        """Wakes whoever waits for progress."""
        self.progress.set()
        self.progress = asyncio.Event()


def row_of(entry: Entry) -> AdapterRow:
    """An adapter as the store shall know it."""
    return AdapterRow(entry.key, entry.uid, entry.kind.value, entry.create_time, entry.source)
