"""What calls were answered, within bounds that no tenant exceeds at the cost of another."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

from google.protobuf.message import Message

from onebase.server.registry import owner_of

Key = tuple[str, str, str]
"""Session id, method (with its tenant before a slash, if it has one), request id."""


@dataclass(frozen=True)
class Stored:
    """An answer as bytes: a message in memory takes up to ten times as much, which no bound would count."""

    digest: bytes
    kind: type[Message]
    data: bytes | None
    """None: there were too many bytes, and it is only known that the call was made."""

    @property
    def response(self) -> Message:
        """The answer, as it was given."""
        return self.kind.FromString(self.data or b"")

    @property
    def size(self) -> int:
        """Bytes that count."""
        return len(self.data or b"")


@dataclass
class _Share:
    """A tenant's answers, the one not asked for the longest first."""

    answers: OrderedDict[Key, Stored] = field(default_factory=OrderedDict)
    whole: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    """Those whose bytes are here."""
    size: int = 0

    def get(self, key: Key) -> Stored | None:
        stored = self.answers.get(key)
        if stored is not None:
            self.answers.move_to_end(key)
            if key in self.whole:
                self.whole.move_to_end(key)
        return stored

    def put(self, key: Key, stored: Stored) -> None:
        self.drop(key)
        self.answers[key] = stored
        self.whole[key] = None
        self.size += stored.size

    def drop(self, key: Key) -> None:
        if key in self.answers:
            self.size -= self.answers.pop(key).size
            self.whole.pop(key, None)

    def empty_oldest(self) -> None:
        key, _ = self.whole.popitem(last=False)
        self.size -= self.answers[key].size
        self.answers[key] = replace(self.answers[key], data=None)


class Answers:
    """Answers by key; those not asked for the longest go first.

    Args:
        capacity: most answers of a tenant.
        capacity_bytes: most bytes of all answers; where there are more, tenants with more than their part of it keep
            of their oldest only that the calls were made. Each tenant's newest stays, whatever its size.
    """

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._shares: dict[str, _Share] = {}

    def get(self, key: Key) -> Stored | None:
        """An answer, which counts as asked for; None if it is not known, or no longer."""
        share = self._shares.get(owner_of(key[1]))
        return None if share is None else share.get(key)

    def put(self, key: Key, stored: Stored) -> None:
        """Keeps an answer, in the place of any other of its key."""
        share = self._shares.setdefault(owner_of(key[1]), _Share())
        share.put(key, stored)
        if len(share.answers) > self._capacity:
            share.drop(next(iter(share.answers)))
        fair = self._capacity_bytes / len(self._shares)
        while sum(one.size for one in self._shares.values()) > self._capacity_bytes:
            over = [one for one in self._shares.values() if one.size > fair and len(one.whole) > 1]
            if not over:
                return
            max(over, key=lambda one: one.size).empty_oldest()
