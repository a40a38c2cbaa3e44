"""Who goes next: turns between tenants, and inside each between its sessions; how far somebody may go ahead of others.

Turns are start-time fair queueing (Goyal et al. 1996): a deficit round robin without rounds. An owner has a tag, which
grows with what he is served, and the lowest tag goes next. The highest tag that had its turn is the present: nobody is
further ahead of it than by what he was served last, and nobody is behind it by more than his credit, so that time away
gives no other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from onebase.server.identity import OPERATOR

T = TypeVar("T")


class Owner(NamedTuple):
    """Whose a task is."""

    tenant: str
    session: str
    """Its queue; "" is all of the tenant's calls without a session."""

    @property
    def party(self) -> Hashable:
        """Who may go ahead of others once: a tenant, however many sessions it has; of the operator, each session."""
        return self if self.tenant == OPERATOR else self.tenant


class Turns:
    """The tags of owners.

    Args:
        credit: how many turns, of the largest there was, an owner may fall behind. It takes one where an owner has few
            turns in a step, so that others get turns in the same step before he has caught up.
    """

    def __init__(self, credit: int = 0) -> None:
        self._tags: dict[Hashable, float] = {}
        self._now = self._least = self._largest = 0.0
        self._credit = credit

    def tag(self, owner: Hashable) -> float:
        """What an owner was served, as if he had always wanted something."""
        return max(self._tags.get(owner, 0.0), self._least)

    def charge(self, owner: Hashable, amount: float) -> None:
        """Notes that it is an owner's turn, and what he is served."""
        tag = self.tag(owner)
        self._tags[owner] = tag + amount
        self._now, self._largest = max(self._now, tag), max(self._largest, amount)
        self._least = self._now - self._credit * self._largest
        if len(self._tags) > 4096:  # the least tag is anybody's
            self._tags = {owner: tag for owner, tag in self._tags.items() if tag > self._least}


class Shares:
    """Turns of tenants, and inside each those of its sessions: who has many sessions gets no more by that.

    Args:
        credit: how many turns a tenant or a session may fall behind.
    """

    def __init__(self, credit: int = 0) -> None:
        self._credit = credit
        self._tenants = Turns(credit)
        self._sessions: dict[str, Turns] = {}

    def tags(self, owner: Owner) -> tuple[float, float]:
        """What his tenant was served, and what he was: the least goes next."""
        sessions = self._sessions.get(owner.tenant)
        return self._tenants.tag(owner.tenant), sessions.tag(owner.session) if sessions else 0.0

    def charge(self, owner: Owner, amount: float) -> None:
        """Notes that it is an owner's turn, and what he is served."""
        self._tenants.charge(owner.tenant, amount)
        self._sessions.setdefault(owner.tenant, Turns(self._credit)).charge(owner.session, amount)


class FairQueue(Generic[T]):
    """Tasks of several owners; the owner that was served the fewest tokens goes next, his tasks in their order.

    Args:
        credit: how many turns an owner may fall behind.
    """

    def __init__(self, credit: int = 0) -> None:
        self._tasks: dict[Hashable, deque[T]] = {}  # who has waited longest since his last turn stands first
        self._turns = Turns(credit)

    def __len__(self) -> int:
        return sum(len(tasks) for tasks in self._tasks.values())

    @property
    def tasks(self) -> tuple[T, ...]:
        """All of them, of one owner after the other. Any thread may ask."""
        return tuple(task for tasks in tuple(self._tasks.values()) for task in tuple(tasks))

    def push(self, owner: Hashable, task: T) -> None:
        """Adds a task; an owner who was away begins level with those who waited, with no credit for the time."""
        self._tasks.setdefault(owner, deque()).append(task)

    def owners(
        self, barred: frozenset[Hashable] = frozenset(), held: frozenset[Hashable] = frozenset()
    ) -> list[Hashable]:
        """Owners with tasks who are not held, the least served first, up to the first barred one.

        Of those who are level, barred ones stand last; of the others, who has waited longest is first.
        """
        there = (owner for owner in self._tasks if owner not in held)
        turns = sorted(there, key=lambda owner: (self._turns.tag(owner), owner in barred))
        return turns[: next((place for place, owner in enumerate(turns) if owner in barred), None)]

    def first(self, owner: Hashable) -> T:
        """An owner's oldest task."""
        return self._tasks[owner][0]

    def in_turn(self, able: Callable[[T], bool]) -> Iterator[tuple[Hashable, T]]:
        """Each task that is able when its turn comes, always the least served owner's next; `charge` counts at once."""
        left = {owner: iter(tuple(tasks)) for owner, tasks in self._tasks.items()}
        while left:
            owner = min(left, key=self._turns.tag)
            task = next(filter(able, left[owner]), None)
            if task is None:
                del left[owner]
            else:
                yield owner, task

    def charge(self, owner: Hashable, tokens: float) -> None:
        """Notes what an owner with tasks is served."""
        self._turns.charge(owner, tokens)
        self._tasks[owner] = self._tasks.pop(owner)

    def has(self, owner: Hashable, task: T) -> bool:
        """Whether a task stands in the queue."""
        return task in self._tasks.get(owner, ())

    def remove(self, owner: Hashable, task: T) -> None:
        """Takes a task out, wherever it stands; nothing happens if it is not there."""
        tasks = self._tasks.get(owner)
        if tasks is None or task not in tasks:
            return
        tasks.remove(task)
        if not tasks:
            del self._tasks[owner]


class TenantQueue(Generic[T]):
    """Tasks of the sessions of several tenants: tenants take turns, and inside each its sessions.

    Args:
        credit: how many turns a tenant or a session may fall behind.
    """

    def __init__(self, credit: int = 0) -> None:
        self._credit = credit
        self._queues: dict[str, FairQueue[T]] = {}  # who has waited longest since its last turn stands first
        self._turns = Turns(credit)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def tasks(self) -> tuple[T, ...]:
        """All of them, of one session after the other. Any thread may ask."""
        return tuple(task for queue in tuple(self._queues.values()) for task in queue.tasks)

    def push(self, owner: Owner, task: T) -> None:
        """Adds a task; who was away begins level with those who waited, with no credit for the time."""
        self._queues.setdefault(owner.tenant, FairQueue(self._credit)).push(owner.session, task)

    def next(self, barred: frozenset[Hashable] = frozenset(), held: frozenset[Hashable] = frozenset()) -> Owner | None:
        """Whose turn it is of those who are not held; None if that one's party is barred, or nobody has a task.

        Of those who are level, barred ones stand last; of the others, who has waited longest is first.
        """
        heads = [
            (tenant, self._head(tenant, queue, barred, held))
            for tenant, queue in self._queues.items()
            if self._waits(tenant, queue, held)
        ]
        tenant, session = min(heads, key=lambda head: (self._turns.tag(head[0]), head[1] is None), default=("", None))
        return None if session is None else Owner(tenant, session)

    def waits(self, held: frozenset[Hashable] = frozenset()) -> bool:
        """Whether anybody has a task who is not held."""
        return any(self._waits(tenant, queue, held) for tenant, queue in self._queues.items())

    def _waits(self, tenant: str, queue: FairQueue[T], held: frozenset[Hashable]) -> bool:
        return bool(queue) and tenant not in held and not (held and not queue.owners(held=_sessions(tenant, held)))

    def _head(
        self, tenant: str, queue: FairQueue[T], barred: frozenset[Hashable], held: frozenset[Hashable]
    ) -> str | None:
        if tenant in barred:
            return None
        turns = queue.owners(_sessions(tenant, barred), _sessions(tenant, held))
        return str(turns[0]) if turns else None

    def parties(self) -> set[Hashable]:
        """Who has tasks."""
        return {Owner(tenant, str(one)).party for tenant, queue in self._queues.items() for one in queue.owners()}

    def first(self, owner: Owner) -> T:
        """An owner's oldest task."""
        return self._queues[owner.tenant].first(owner.session)

    def in_turn(self, able: Callable[[T], bool]) -> Iterator[tuple[Owner, T]]:
        """Each task that is able when its turn comes, always the least served owner's next; `charge` counts at once."""
        left = {tenant: queue.in_turn(able) for tenant, queue in self._queues.items() if queue}
        while left:
            tenant = min(left, key=self._turns.tag)
            found = next(left[tenant], None)
            if found is None:
                del left[tenant]
            else:
                yield Owner(tenant, str(found[0])), found[1]

    def charge(self, owner: Owner, tokens: float) -> None:
        """Notes what an owner with tasks is served."""
        self._turns.charge(owner.tenant, tokens)
        queue = self._queues[owner.tenant] = self._queues.pop(owner.tenant)
        queue.charge(owner.session, tokens)

    def has(self, owner: Owner, task: T) -> bool:
        """Whether a task stands in the queue."""
        queue = self._queues.get(owner.tenant)
        return queue is not None and queue.has(owner.session, task)

    def remove(self, owner: Owner, task: T) -> None:
        """Takes a task out, wherever it stands; nothing happens if it is not there."""
        queue = self._queues.get(owner.tenant)
        if queue is not None:
            queue.remove(owner.session, task)


def _sessions(tenant: str, parties: frozenset[Hashable]) -> frozenset[Hashable]:
    """The tenant's sessions among parties."""
    return frozenset(one.session for one in parties if isinstance(one, Owner) and one.tenant == tenant)


class Debts:
    """What parties have cost in vain, in seconds; each pays with its share of the device's time.

    Args:
        most: a debt never grows beyond it, so that it is paid soon after its cause has gone.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._owed: dict[Hashable, float] = {}

    def __bool__(self) -> bool:
        return bool(self._owed)

    @property
    def debtors(self) -> frozenset[Hashable]:
        """Who owes something."""
        return frozenset(self._owed)

    def add(self, party: Hashable, seconds: float) -> None:
        """A party has cost so much."""
        self._owed[party] = min(self._most, self._owed.get(party, 0.0) + seconds)

    def pay(self, seconds: float) -> None:
        """Each has paid so much."""
        self._owed = {party: left for party, owed in self._owed.items() if (left := owed - seconds) > 0}


class Lead:
    """How far owners may still go ahead of somebody whose turn it is: together so far, and each of them once."""

    def __init__(self) -> None:
        self._whole = self._left = 0.0
        self._gone: defaultdict[Hashable, float] = defaultdict(float)

    def barred(self, sharers: int = 1) -> frozenset[Hashable]:
        """Owners who may not: those who have done so, once nothing is left, or nothing of their share.

        Args:
            sharers: among so many it is shared.
        """
        share = self._whole / sharers
        return frozenset(owner for owner, used in self._gone.items() if self._left <= 0 or used >= share)

    def use(self, owners: Collection[Hashable], amount: float) -> None:
        """Notes that owners went ahead, and how far together."""
        self._left -= amount
        for owner in owners:
            self._gone[owner] += amount / len(owners)

    def renew(self, amount: float) -> None:
        """Begins anew, after the turn of whoever had to wait."""
        self._whole = self._left = amount
        self._gone.clear()
