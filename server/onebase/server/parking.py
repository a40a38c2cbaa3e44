"""Jobs of adapters that are not in device memory: they wait while another thread reads the adapter, and then go on.

The jobs of one adapter keep their order and share one reading of it; those that name several wait for all of them.
Others go on meanwhile, also those that name an adapter which is there and which a parked job names too: nobody is held
up by a disk that is not asked for him. If a reading fails, so do the jobs that wait for it; the next one tries again.

Everything here runs on the worker's thread, but for the reading itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from onebase.server.engine import Engine
from onebase.server.engine.absent import Absent
from onebase.server.errors import Cancelled, DeadlineExceeded, OnebaseError
from onebase.server.executor import Aside
from onebase.server.isolation import told
from onebase.server.jobs import (
    AdapterFacts,
    ClientState,
    ClientStateJob,
    DeleteAdapterJob,
    DropGradientsJob,
    EvictAdapterJob,
    Job,
    SaveAdapterJob,
    Work,
    adapters_of,
)

LOOK_SECONDS = 0.05
"""How soon a cancel or a deadline of a parked job is seen while there is nothing else to do."""


class Parking:
    """The jobs that wait for adapters.

    Args:
        engine: has the adapters.
        max_rank: of adapters to read.
        begin_aside: has another thread do its part of a job, and resolves the job then.
        admit: takes in a job that need not wait any more.
    """

    def __init__(
        self,
        engine: Engine,
        max_rank: int,
        begin_aside: Callable[[Job[Any], Aside], None],
        admit: Callable[[Job[Any]], None],
    ) -> None:
        self._engine = engine
        self._max_rank = max_rank
        self._begin_aside = begin_aside
        self._admit = admit
        self._jobs: list[Job[Any]] = []  # in the order they came
        self._reading: set[int] = set()

    @property
    def jobs(self) -> tuple[Job[Any], ...]:
        """Those that are parked."""
        return tuple(self._jobs)

    @property
    def patience(self) -> float | None:
        """Seconds for which nobody need look after the parked jobs; None where there are none."""
        return LOOK_SECONDS if self._jobs else None

    def waiting(self) -> Counter[Work]:
        """The parked jobs by their kind of work. Any thread may ask."""
        return Counter(job.work for job in list(self._jobs))

    def keep(self, job: Job[Any]) -> bool:
        """Parks a job that must wait; False if it need not."""
        self._note_use(job)
        missing = self._missing(job)
        if not missing:
            return False
        if isinstance(job, DropGradientsJob) and job.adapter not in self._reading:
            _resolve(job, self._engine.absent[job.adapter].facts)  # what was evicted had none
            return True
        if isinstance(job, ClientStateJob) and job.adapter not in self._reading:
            _resolve(job, self._engine.absent[job.adapter].shell.client_state)
            return True
        self._jobs.append(job)
        for uid in missing - self._reading:
            self._read(uid, self._engine.absent[uid])
        return True

    def evict(self, job: EvictAdapterJob, others: Iterable[Job[Any]]) -> AdapterFacts:
        """Evicts an adapter if neither these jobs nor anything else needs it.

        Raises:
            NotFound: it is gone.
        """
        uid = job.adapter
        if (absent := self._engine.absent.get(uid)) is not None:
            return absent.facts
        adapter = self._engine.adapter(uid)
        named = any(uid in adapters_of(other) for other in (*others, *self._jobs))
        if named or adapter.read or adapter.pending or adapter.weights.version != job.version:
            return adapter.facts()
        return self._engine.evict(uid, job.open)

    def drop(self) -> None:
        """Ends what was cancelled or is too late; goes on with what waits for nothing any more."""
        now = time.monotonic()
        for job in list(self._jobs):
            error = overdue(job, now)
            if error is not None:
                self._jobs.remove(job)
                _resolve(job, error)
        self._go_on()

    def fail_all(self, error: OnebaseError) -> None:
        """Ends all of them."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            _resolve(job, error)

    def _missing(self, job: Job[Any]) -> set[int]:
        """The adapters that a job waits for; a job that deletes one waits for nothing."""
        if isinstance(job, DeleteAdapterJob):
            return set()
        return {uid for uid in adapters_of(job) if uid in self._engine.absent}

    def _go_on(self) -> None:
        """Takes in those whose adapters are all there; what waits for a deleted one is told so by the engine."""
        ready = [job for job in self._jobs if not self._missing(job)]
        if ready:
            self._jobs = [job for job in self._jobs if job not in ready]
            for job in ready:
                try:
                    self._admit(job)
                except Exception as error:  # a bug in there must not leave a client waiting
                    _resolve(job, told(error))

    def _read(self, uid: int, absent: Absent) -> None:
        self._reading.add(uid)
        reading: Job[None] = Job()
        reading.done.add_done_callback(lambda done: self._was_read(uid, absent, done))
        formats = self._engine.formats
        try:
            self._begin_aside(reading, Aside(lambda: absent.read(formats, self._max_rank), self._engine.take_back))
        except Exception as error:  # no room for another thread, say: the jobs that wait for it fail, and nobody else
            self._reading.discard(uid)
            self._fail(uid, absent, told(error))

    def _was_read(self, uid: int, absent: Absent, done: Future[None]) -> None:
        self._reading.discard(uid)
        error = done.exception()
        if isinstance(error, Exception) and uid in self._engine.absent:
            self._fail(uid, absent, told(error))
        self._go_on()

    def _fail(self, uid: int, absent: Absent, error: OnebaseError) -> None:
        """Ends those that wait for an adapter which cannot be read. There are no gradients to drop of it."""
        what = f"adapter {absent.shell.name!r} is not in memory, and cannot be read again: {error.message}"
        waiting = [job for job in self._jobs if uid in adapters_of(job)]
        self._jobs = [job for job in self._jobs if job not in waiting]
        for job in waiting:
            drops = isinstance(job, DropGradientsJob)
            _resolve(job, absent.facts if drops else type(error)(error.reason, what, retry_after=error.retry_after))

    def _note_use(self, job: Job[Any]) -> None:
        """Notes when adapters were used: at the beginning of a job and, unless it was given up, at its end."""
        if isinstance(job, SaveAdapterJob | DropGradientsJob | DeleteAdapterJob):
            return

        def note(_: object = None) -> None:
            for uid in adapters_of(job):
                if (adapter := self._engine.adapters.get(uid)) is not None:
                    adapter.used = time.monotonic()

        note()
        job.done.add_done_callback(note)


def overdue(job: Job[Any], now: float) -> OnebaseError | None:
    """Why a job shall not go on at that time of time.monotonic's clock, or None."""
    if job.cancelled:
        return Cancelled("CANCELLED", "the client cancelled")
    if job.deadline is not None and now > job.deadline:
        return DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed before the work was done")
    return None


def _resolve(job: Job[Any], outcome: AdapterFacts | ClientState | OnebaseError) -> None:
    if not job.done.set_running_or_notify_cancel():
        return
    if isinstance(outcome, OnebaseError):
        job.done.set_exception(outcome)
    else:
        job.done.set_result(outcome)
