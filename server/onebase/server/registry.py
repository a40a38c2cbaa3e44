"""Which adapters there are: name → uid, kind, version, and what the engine last said of them.

A uid is never used twice. A name is reserved while its adapter is being made, and bound when the engine has it.
Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from onebase.server.errors import Aborted, AlreadyExists, DataLoss, NotFound
from onebase.server.jobs import BASE, AdapterFacts, AdapterKind
from onebase.server.names import check_name, hint


@dataclass(frozen=True)
class Entry:
    """A bound name."""

    name: str
    facts: AdapterFacts
    create_time: float
    """Seconds since 1970."""
    source: str
    """Where it was loaded from; empty for one made here."""

    @property
    def uid(self) -> int:
        """What jobs call it."""
        return self.facts.uid

    @property
    def kind(self) -> AdapterKind:
        """What it is for."""
        return self.facts.kind


@dataclass(frozen=True)
class Reservation:
    """A name that is being given to the adapter `uid`; `old` is what it means until then."""

    name: str
    uid: int
    old: Entry | None


class Registry:
    """The adapters by name.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._names: dict[int, str] = {}
        self._reserved: set[str] = set()
        self._damaged: dict[str, DataLoss] = {}
        self._last_uid = BASE

    def start_after(self, uid: int) -> None:
        """Gives no uid up to this one: the server that was here before may have given it."""
        self._last_uid = max(self._last_uid, uid)

    def restore(self, entry: Entry) -> None:
        """Binds a name as the server that was here before had it."""
        self._entries[entry.name] = entry
        self._names[entry.uid] = entry.name

    def damage(self, name: str, error: DataLoss) -> None:
        """Keeps a name for an adapter that cannot be read: whoever asks for it is told the error."""
        self._damaged[name] = error

    def damaged(self, name: str) -> bool:
        """Whether the adapter of that name cannot be read."""
        return name in self._damaged

    def reserve(self, name: str, *, replacing: bool = False) -> Reservation:
        """Sets a name aside for a new uid; what it means now, if `replacing`, it means until bind().

        Raises:
            AlreadyExists: ADAPTER_EXISTS.
            Aborted: ADAPTER_BUSY: another call is replacing it.
        """
        if name in self._reserved:
            if replacing:
                raise Aborted(
                    "ADAPTER_BUSY", f"adapter {name!r} is being made by another call: try again", field="name"
                )
            raise _taken(name)
        old = self._entries.get(name)
        if (old is not None or name in self._damaged) and not replacing:
            raise _taken(name)
        self._reserved.add(name)
        self._last_uid += 1
        return Reservation(name, self._last_uid, old)

    def release(self, reservation: Reservation) -> None:
        """Gives a reserved name back; what it meant before, it means still."""
        self._reserved.discard(reservation.name)

    def bind(self, reservation: Reservation, facts: AdapterFacts, source: str) -> Entry:
        """Gives a reserved name to the adapter that the engine made."""
        entry = self.prospect(reservation, facts, source)
        self.take(reservation, entry)
        return entry

    def prospect(self, reservation: Reservation, facts: AdapterFacts, source: str) -> Entry:
        """What a reserved name will mean; nothing changes yet."""
        return Entry(reservation.name, facts, self._clock(), source)

    def take(self, reservation: Reservation, entry: Entry) -> None:
        """Gives a reserved name to an entry that `prospect` made."""
        self.release(reservation)
        self.remove(reservation.name)
        self.restore(entry)

    def remove(self, name: str) -> Entry | None:
        """Forgets a name at once; returns what it meant."""
        self._damaged.pop(name, None)
        entry = self._entries.pop(name, None)
        if entry is not None:
            del self._names[entry.uid]
        return entry

    def get(self, name: str, field: str, kind: AdapterKind | None = None) -> Entry:
        """The adapter of that name; `kind` is the one wanted, for the hint alone.

        Raises:
            InvalidArgument: BAD_ADAPTER_NAME.
            NotFound: ADAPTER_NOT_FOUND, with near names.
            DataLoss: CHECKPOINT_DAMAGED.
        """
        check_name(name, field)
        entry = self._entries.get(name)
        if name in self._damaged:
            raise self._damaged[name]
        if entry is None:
            known = [one.name for one in self.entries(kind)]
            what = f"{kind.value} adapter" if kind else "adapter"
            raise NotFound("ADAPTER_NOT_FOUND", f"there is no {what} {name!r}: {hint(name, known)}", field=field)
        return entry

    def find(self, name: str) -> Entry | None:
        """The adapter of that name, if there is one."""
        return self._entries.get(name)

    def current(self, uid: int) -> Entry | None:
        """The entry of a uid, if its name still means it."""
        name = self._names.get(uid)
        return self._entries.get(name) if name is not None else None

    def entries(self, kind: AdapterKind | None = None) -> list[Entry]:
        """All adapters, or those of one kind, by name."""
        return [one for _, one in sorted(self._entries.items()) if kind is None or one.kind is kind]

    def update(self, facts: AdapterFacts) -> None:
        """Takes what the engine says of an adapter, unless its name has moved on."""
        entry = self.current(facts.uid)
        if entry is not None and facts.version >= entry.facts.version:
            self._entries[entry.name] = replace(entry, facts=facts)


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(
        "ADAPTER_EXISTS",
        f"there is an adapter {name!r} already: choose another name, delete it first, or load with `replace`",
        field="name",
    )
