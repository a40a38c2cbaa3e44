"""Adapters that are made, read or written, until a thread of the files is free for them: tenants take turns.

What such work needs of the device, a copy of an adapter's moments above all, is taken when its thread is free and not
before: so many that wait need no memory. One thread is left for what cannot wait in here, and of the others one for
tenants that come later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from onebase.server.errors import OnebaseError
from onebase.server.identity import OPERATOR
from onebase.server.jobs import CreateAdapterJob, Job, LoadAdapterJob, SaveAdapterJob, Work
from onebase.server.turns import Owner, TenantQueue


def waits_for_a_thread(job: Job[Any]) -> bool:
    """Whether a job waits in here.

    A copy of an adapter is made at once. What a trainer leaves with an adapter is left in the order in which it came,
    so the save that leaves it does not wait.
    """
    match job:
        case CreateAdapterJob():
            return job.init_from is None
        case SaveAdapterJob():
            return job.client_state is None
        case _:
            return isinstance(job, LoadAdapterJob)


class Filing:
    """The jobs that wait for a thread, and those that have one.

    Args:
        threads: of the files, in all.
    """

    def __init__(self, threads: int) -> None:
        self._most = max(1, threads - 1)
        self._most_of_a_tenant = max(1, threads - 2)
        self._waiting: TenantQueue[Job[Any]] = TenantQueue()
        self._under_way: dict[Job[Any], str] = {}

    @property
    def jobs(self) -> tuple[Job[Any], ...]:
        """Those that wait."""
        return self._waiting.tasks

    def waiting(self) -> Counter[Work]:
        """Those that wait, by their kind of work. Any thread may ask."""
        return Counter({Work.ADMIN: len(self.jobs)})

    def keep(self, job: Job[Any]) -> None:
        """Has a job wait."""
        self._waiting.push(Owner(job.tenant, job.session), job)

    def next(self) -> Job[Any] | None:
        """A job that may begin now, and has its thread until `ended`; None if there is none."""
        if len(self._under_way) >= self._most:
            return None
        there = Counter(self._under_way.values())
        held = frozenset(t for t, count in there.items() if count >= self._most_of_a_tenant and t != OPERATOR)
        owner = self._waiting.next(held=held)
        if owner is None:
            return None
        job = self._waiting.first(owner)
        self._waiting.charge(owner, 1)
        self._waiting.remove(owner, job)
        self._under_way[job] = job.tenant
        return job

    def ended(self, job: Job[Any]) -> None:
        """A job needs its thread no more; means nothing to one that has none."""
        self._under_way.pop(job, None)

    def drop(self, error_of: Callable[[Job[Any]], OnebaseError | None]) -> list[tuple[Job[Any], OnebaseError]]:
        """Takes out those that wait and are given an error: with it."""
        found = [(job, error) for job in self.jobs if (error := error_of(job)) is not None]
        for job, _ in found:
            self._waiting.remove(Owner(job.tenant, job.session), job)
        return found
