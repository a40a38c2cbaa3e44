"""Which adapters there are: name → uid, kind, version, and what the engine last said of them.

Each tenant has names of its own, and the operator's are everybody's to read: a name means the caller's own adapter, or
else the operator's. What a caller may not see is not there.

A uid is never used twice, and neither is a version of a name: an adapter that is made where another was goes on after
it, also when that was deleted. A name is reserved while its adapter is being made, and bound when the engine has it.
Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from onebase.server.errors import Aborted, AlreadyExists, DataLoss, NotFound, PermissionDenied
from onebase.server.identity import OPERATOR, Caller, caller
from onebase.server.jobs import BASE, AdapterFacts, AdapterKind
from onebase.server.names import check_name, hint
from onebase.server.store import MAX_ENDS


@dataclass(frozen=True)
class Entry:
    """A bound name."""

    name: str
    facts: AdapterFacts
    create_time: float
    """Seconds since 1970."""
    source: str
    """Where it was loaded from; empty for one made here."""
    owner: str = OPERATOR
    """The tenant whose it is."""

    @property
    def key(self) -> str:
        """What leases call it: its name among those of all tenants."""
        return key_of(self.owner, self.name)

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
    """A name that is being given to the adapter `uid`; `old` is what it means until then.

    `least_version` is the first that no adapter of this name has had.
    """

    name: str
    uid: int
    old: Entry | None
    owner: str = OPERATOR
    least_version: int = 0

    @property
    def key(self) -> str:
        """The name among those of all tenants."""
        return key_of(self.owner, self.name)


class Registry:
    """The adapters by name.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._keys: dict[int, str] = {}
        self._reserved: set[str] = set()
        self._damaged: dict[str, DataLoss] = {}
        self._ends: defaultdict[str, dict[str, int]] = defaultdict(dict)  # by owner and key, the first that is free
        self._last_uid = BASE

    def start_after(self, uid: int) -> None:
        """Gives no uid up to this one: the server that was here before may have given it."""
        self._last_uid = max(self._last_uid, uid)

    def restore(self, entry: Entry) -> None:
        """Binds a name as the server that was here before had it."""
        self._entries[entry.key] = entry
        self._keys[entry.uid] = entry.key

    def damage(self, key: str, error: DataLoss) -> None:
        """Keeps a key for an adapter that cannot be read: whoever means it is told the error."""
        self._damaged[key] = error

    def end(self, key: str, least_version: int) -> None:
        """Notes that adapters of that key have had all versions before this one."""
        ends = self._ends[owner_of(key)]
        ends[key] = max(ends.pop(key, 0), least_version)
        if len(ends) > MAX_ENDS:
            del ends[next(iter(ends))]

    def damaged(self, name: str) -> bool:
        """Whether the caller's own adapter of that name cannot be read."""
        return key_of(caller().tenant, name) in self._damaged

    def least_version(self, key: str) -> int:
        """The first version that no adapter of that key has had."""
        entry = self._entries.get(key)
        return entry.facts.version + 1 if entry is not None else self._ends[owner_of(key)].get(key, 0)

    def reserve(self, name: str, *, replacing: bool = False) -> Reservation:
        """Sets a name aside for a new uid; what it means now, if `replacing`, it means until bind().

        Raises:
            AlreadyExists: ADAPTER_EXISTS.
            Aborted: ADAPTER_BUSY: another call is replacing it.
            PermissionDenied: NOT_OWNER, where it is the operator's.
        """
        who = caller()
        old = self._meant(name, who)
        owner = old.owner if old is not None else who.tenant
        _check_may_name(who, owner, name)
        if key_of(owner, name) in self._reserved:
            if replacing:
                raise Aborted(
                    "ADAPTER_BUSY", f"adapter {name!r} is being made by another call: try again", field="name"
                )
            raise _taken(name)
        if (old is not None or key_of(owner, name) in self._damaged) and not replacing:
            raise _taken(name)
        if old is not None:
            self.check_may_change(old)
        self._reserved.add(key_of(owner, name))
        self._last_uid += 1
        return Reservation(name, self._last_uid, old, owner, self.least_version(key_of(owner, name)))

    def release(self, reservation: Reservation) -> None:
        """Gives a reserved name back; what it meant before, it means still."""
        self._reserved.discard(reservation.key)

    def bind(self, reservation: Reservation, facts: AdapterFacts, source: str) -> Entry:
        """Gives a reserved name to the adapter that the engine made."""
        entry = self.prospect(reservation, facts, source)
        self.take(reservation, entry)
        return entry

    def prospect(self, reservation: Reservation, facts: AdapterFacts, source: str) -> Entry:
        """What a reserved name will mean; nothing changes yet."""
        return Entry(reservation.name, facts, self._clock(), source, reservation.owner)

    def take(self, reservation: Reservation, entry: Entry) -> None:
        """Gives a reserved name to an entry that `prospect` made."""
        self.release(reservation)
        self.remove(reservation.key)
        self.restore(entry)

    def remove(self, key: str) -> Entry | None:
        """Forgets an adapter at once, by its key; returns what it was."""
        self._damaged.pop(key, None)
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._keys[entry.uid]
            self.end(key, entry.facts.version + 1)
        return entry

    def get(self, name: str, field: str, kind: AdapterKind | None = None) -> Entry:
        """The adapter that the caller means by that name; `kind` is the one wanted, for the hint alone.

        Raises:
            InvalidArgument: BAD_ADAPTER_NAME.
            NotFound: ADAPTER_NOT_FOUND, with near names.
            DataLoss: CHECKPOINT_DAMAGED.
        """
        check_name(name, field)
        self._check_whole(name, caller())
        entry = self._meant(name, caller())
        if entry is None:
            known = [one.name for one in self.entries(kind)]
            what = f"{kind.value} adapter" if kind else "adapter"
            raise NotFound("ADAPTER_NOT_FOUND", f"there is no {what} {name!r}: {hint(name, known)}", field=field)
        return entry

    def check_may_change(self, entry: Entry) -> None:
        """Refuses to have somebody train, replace or delete an adapter of the operator's.

        Raises:
            PermissionDenied: NOT_OWNER.
        """
        if not caller().may_change(entry.owner, entry.name):
            raise PermissionDenied(
                "NOT_OWNER",
                f"adapter {entry.name!r} is the operator's, and the token {caller().token} may only read it: make one "
                f"of your own, or ask for a token with --adapter {entry.name}",
            )

    def find(self, key: str) -> Entry | None:
        """The adapter of that key, if there is one."""
        return self._entries.get(key)

    def current(self, uid: int) -> Entry | None:
        """The entry of a uid, if its name still means it."""
        key = self._keys.get(uid)
        return self._entries.get(key) if key is not None else None

    def entries(self, kind: AdapterKind | None = None) -> list[Entry]:
        """All adapters that the caller may mean, or those of one kind, by name."""
        who = caller()
        there = [one for one in self._entries.values() if kind is None or one.kind is kind]
        return sorted((one for one in there if self._meant(one.name, who) is one), key=lambda one: one.name)

    def of_tenant(self, tenant: str | None) -> list[Entry]:
        """All adapters of a tenant, or of everybody, by key."""
        return [one for _, one in sorted(self._entries.items()) if tenant is None or one.owner == tenant]

    def _check_whole(self, name: str, who: Caller) -> None:
        """Raises the error of an adapter that cannot be read; a caller's own goes before the operator's."""
        for key in (key_of(who.tenant, name), key_of(OPERATOR, name)):
            if key in self._damaged:
                raise self._damaged[key]
            if key in self._entries:
                return

    def _meant(self, name: str, who: Caller) -> Entry | None:
        for owner in (who.tenant, OPERATOR):
            entry = self._entries.get(key_of(owner, name))
            if entry is not None and who.may_see(owner, name, trained=entry.kind.trained):
                return entry
        return None

    def update(self, facts: AdapterFacts) -> None:
        """Takes what the engine says of an adapter, unless its name has moved on."""
        entry = self.current(facts.uid)
        if entry is not None and facts.version >= entry.facts.version:
            self._entries[entry.key] = replace(entry, facts=facts)


def key_of(owner: str, name: str) -> str:
    """A name among those of all tenants; the operator's is the name itself."""
    return name if owner == OPERATOR else f"{owner}/{name}"


def owner_of(key: str) -> str:
    """The tenant of a key."""
    return key.rpartition("/")[0] or OPERATOR


def _check_may_name(who: Caller, owner: str, name: str) -> None:
    """A token that means certain adapters only makes no others."""
    if who.adapters and name not in who.adapters and owner == who.tenant:
        raise PermissionDenied(
            "NOT_OWNER",
            f"the token {who.token} means no adapter {name!r}: use one of {', '.join(sorted(who.adapters))}, or ask "
            f"for a token with --adapter {name}",
            field="name",
        )


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(
        "ADAPTER_EXISTS",
        f"there is an adapter {name!r} already: choose another name, delete it first, or load with `replace`",
        field="name",
    )
