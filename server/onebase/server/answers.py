"""What calls were answered, within bounds that no tenant exceeds at the cost of another."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from google.protobuf.message import Message

from onebase.server.registry import owner_of

Key = tuple[str, str, str]
"""Session id, method (with its tenant before a slash, if it has one), request id."""


@dataclass(frozen=True)
class Stored:
    """An answer as bytes: a message in memory takes up to ten times as much, which no bound would count."""

    digest: bytes
    kind: type[Message]
    data: bytes

    @property
    def response(self) -> Message:
        """The answer, as it was given."""
        return self.kind.FromString(self.data)


@dataclass
class _Share:
    """A tenant's answers, the one not asked for the longest first."""

    answers: OrderedDict[Key, Stored] = field(default_factory=OrderedDict)
    size: int = 0

    def drop(self, key: Key) -> int:
        size = len(self.answers.pop(key).data)
        self.size -= size
        return size


class Answers:
    """Answers by key; those not asked for the longest go first.

    Args:
        capacity: most answers of a tenant.
        capacity_bytes: most bytes of all answers; where there are more, those go whose tenants have more than their
            part of it. Each tenant's newest stays, whatever its size.
    """

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._shares: dict[str, _Share] = {}

    def get(self, key: Key) -> Stored | None:
        """An answer, which counts as asked for; None if it is not known, or no longer."""
        share = self._shares.get(owner_of(key[1]))
        if share is None or key not in share.answers:
            return None
        share.answers.move_to_end(key)
        return share.answers[key]

    def put(self, key: Key, stored: Stored) -> None:
        """Keeps an answer, in the place of any other of its key."""
        share = self._shares.setdefault(owner_of(key[1]), _Share())
        if key in share.answers:
            self._bytes -= share.drop(key)
        share.answers[key] = stored
        share.size += len(stored.data)
        self._bytes += len(stored.data)
        if len(share.answers) > self._capacity:
            self._drop_oldest(share)
        fair = self._capacity_bytes / len(self._shares)
        while self._bytes > self._capacity_bytes:
            over = [one for one in self._shares.values() if one.size > fair and len(one.answers) > 1]
            if not over:
                return
            self._drop_oldest(max(over, key=lambda one: one.size))

    def _drop_oldest(self, share: _Share) -> None:
        self._bytes -= share.drop(next(iter(share.answers)))
