"""What one tenant, and all of them together, may have at once: requests, completions, tokens a second.

A quota is asked before anything is read, queued or allocated: a request has its place from before it is read until it
is done. What a refusal says of waiting is true, also of the worker's queues (`accounts`, `forecast`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from onebase.server.accounts import Account, Clock, Cost
from onebase.server.config import Limits, Quota
from onebase.server.errors import Gone, ResourceExhausted
from onebase.server.forecast import Forecast
from onebase.server.identity import caller
from onebase.server.jobs import (
    BaseFacts,
    DeleteAdapterJob,
    DescribeAdaptersJob,
    DropGradientsJob,
    EvictAdapterJob,
    ForwardBackwardJob,
    GenerateJob,
    Job,
    ScoreJob,
    Work,
    WorkerStatus,
)
from onebase.server.ports import WorkerLike
from onebase.server.turns import Owner

SESSION_FULL = "SESSION_QUEUE_FULL"
"""The worker's reason where a session's share of the queue is used up."""

_FREE = (DeleteAdapterJob, DropGradientsJob, DescribeAdaptersJob, EvictAdapterJob)
"""What takes no room, or gives some back: it is never refused."""


class Place:
    """A request's, from before it is read until its job is done."""

    def __init__(self, quotas: QuotaWorker, owner: Owner, account: Account, *, admin: bool) -> None:
        self.owner = owner
        self.account = account
        self.admin = admin
        """Whether it works on adapters themselves: for that there is always room in the worker."""
        self.leaving: list[Callable[[bool], None]] = []
        """Are called when it ends, and told whether it came to work."""
        self.taken = False
        """Whether a job has it, and gives it back."""
        self._quotas = quotas

    def submit(self, job: Job[Any]) -> None:
        """Queues the request's job, which has the place from now on.

        Raises:
            ResourceExhausted: QUOTA_COMPLETIONS, QUOTA_TOKENS_PER_SECOND; or the worker's, with a forecast of its
                queue.
            OnebaseError: the worker's.
        """
        self._quotas.begin(self, job)


class QuotaWorker:
    """A worker that takes in no more than the quotas allow.

    Args:
        worker: does the work.
        tenant: what each tenant may have.
        whole: what all of them may have together.
        clock: seconds that only grow.
        limits: of requests that are being read, as many as of those that are queued.
    """

    def __init__(
        self,
        worker: WorkerLike,
        tenant: Quota,
        whole: Quota,
        clock: Clock = time.monotonic,
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        self._worker = worker
        self._tenant_quota = tenant
        self._clock = clock
        self._limits = limits
        self._lock = threading.Lock()  # jobs end on the worker's thread
        self._whole = Account("all clients together", whole, clock)
        self._tenants: dict[str, Account] = {}
        self._sessions: dict[str, Forecast] = {}  # of those with requests under way
        self._reading: Counter[str] = Counter()  # requests that are being read, by session
        self._parties: Counter[Hashable] = Counter()  # requests under way

    @property
    def facts(self) -> BaseFacts:
        """The worker's."""
        return self._worker.facts

    def submit(self, job: Job[Any]) -> None:
        """Queues a job, if its tenant and all of them may have it.

        Raises:
            ResourceExhausted: as `place` and `Place.submit` do.
            OnebaseError: the worker's.
        """
        if isinstance(job, _FREE):
            self._worker.submit(job)
            return
        with self.place(job.session, admin=job.work is Work.ADMIN) as place:
            place.submit(job)

    @contextlib.contextmanager
    def place(self, session: str, *, admin: bool = False) -> Iterator[Place]:
        """Room for a request that is about to be read; it is given back after the block, unless a job has it.

        Raises:
            ResourceExhausted: QUOTA_REQUESTS, QUOTA_TOKENS_PER_SECOND; or the worker's, with a forecast of its queue.
        """
        place = self._enter(session, admin=admin)
        try:
            yield place
        finally:
            if not place.taken:
                self._leave(place, worked=False)

    def check(self, session: str) -> None:
        """Refuses at once whom `place` would refuse.

        Raises:
            ResourceExhausted: as `place` does.
        """
        self._check(Owner(caller().tenant, session), admin=False)

    def _check(self, owner: Owner, *, admin: bool) -> Account:
        """The tenant's account, if there is room for one request more."""
        with self._charged(owner), self._lock:
            account = self._tenants.get(owner.tenant) or self._account(owner.tenant)
            account.check(files=admin)
        if not admin:
            with self._charged_if_much(owner):
                with self._lock:
                    self._whole.check()
                with self._told(owner.session):
                    self._check_reading(owner.session)
                    self._worker.check(owner.session)
        return account

    def _check_reading(self, session: str) -> None:
        limits = self._limits
        if self._reading.total() >= limits.max_queued_requests:
            there = f"{self._reading.total()} requests are being read, the server's limit: try again"
            raise ResourceExhausted("QUEUE_FULL", there, retry_after=1.0)
        if session and self._reading[session] >= limits.max_queued_requests_per_session:
            there = f"{self._reading[session]} requests of this session are being read, its limit: wait for some"
            raise ResourceExhausted(SESSION_FULL, there, retry_after=0.5)

    def _enter(self, session: str, *, admin: bool) -> Place:
        owner = Owner(caller().tenant, session)
        account = self._check(owner, admin=admin)
        place = Place(self, owner, account, admin=admin)
        with self._lock:
            self._tenants[owner.tenant] = account
            place.leaving.append(account.enter(files=admin))
            if not admin:
                self._reading[session] += 1
                forecast = self._sessions.setdefault(session, Forecast(self._clock))
                place.leaving += [self._whole.enter(), self._of_session(session, forecast)]
                place.leaving.append(self._of_party(owner))
        return place

    def begin(self, place: Place, job: Job[Any]) -> None:
        """Queues a job that has a place."""
        cost = _cost(job)
        with self._charged(place.owner), self._lock:
            place.account.check_cost(cost)
        with self._charged_if_much(place.owner):
            with self._lock:
                self._whole.check_cost(cost)
            with self._told(place.owner.session):
                self._worker.submit(job)
        with self._lock:
            self._was_read(place)
            ends = [place.account.begin(cost), self._whole.begin(cost)]
        place.taken = True
        job.done.add_done_callback(lambda _: self._end(place, job, ends))

    def _end(self, place: Place, job: Job[Any], ends: list[Callable[[bool], None]]) -> None:
        gone = not job.done.cancelled() and isinstance(job.done.exception(), Gone)
        with self._lock:
            for end in ends:
                end(gone)  # its call looks again what its names mean, and the same tokens are counted then
        self._leave(place, worked=True)

    def _leave(self, place: Place, *, worked: bool) -> None:
        with self._lock:
            if not worked:
                self._was_read(place)
            for leave in place.leaving:
                leave(worked)

    def _was_read(self, place: Place) -> None:
        if not place.admin:
            self._reading[place.owner.session] -= 1
            if not self._reading[place.owner.session]:
                del self._reading[place.owner.session]

    def _of_session(self, session: str, forecast: Forecast) -> Callable[[bool], None]:
        number = forecast.begin()

        def leave(worked: bool) -> None:
            forecast.end(number, counts=worked)
            if forecast.idle:
                self._sessions.pop(session, None)

        return leave

    def _of_party(self, owner: Owner) -> Callable[[bool], None]:
        party = owner.party
        self._parties[party] += 1

        def leave(_worked: bool) -> None:
            self._parties[party] -= 1
            if not self._parties[party]:
                del self._parties[party]

        return leave

    def refused(self, tenant: str, session: str) -> None:
        """As the worker does."""
        self._worker.refused(tenant, session)

    @contextlib.contextmanager
    def _charged(self, owner: Owner) -> Iterator[None]:
        """Has who is refused for what is his own pay for that."""
        try:
            yield
        except ResourceExhausted:
            self._worker.refused(*owner)
            raise

    @contextlib.contextmanager
    def _charged_if_much(self, owner: Owner) -> Iterator[None]:
        """Has who is refused pay for that if he has his share of what is full: others are its victims."""
        try:
            yield
        except ResourceExhausted as error:
            with self._lock:
                even = self._parties.total() / max(1, len(self._parties))
                much = error.reason == SESSION_FULL or 0 < even <= self._parties[owner.party]
            if much:
                self._worker.refused(*owner)
            raise

    @contextlib.contextmanager
    def _told(self, session: str) -> Iterator[None]:
        """Says of the worker's refusals when there will be room."""
        try:
            yield
        except ResourceExhausted as error:
            with self._lock:
                forecast = self._sessions.get(session) if error.reason == SESSION_FULL else self._whole.of_requests
                if forecast is not None and not forecast.idle:
                    error.retry_after = forecast.wait()
            raise

    def status(self) -> WorkerStatus:
        """The worker's."""
        return self._worker.status()

    def stuck_seconds(self) -> float:
        """The worker's."""
        return self._worker.stuck_seconds()

    def lost(self) -> str:
        """The worker's."""
        return self._worker.lost()

    def abandon(self, why: str) -> str:
        """As the worker does."""
        return self._worker.abandon(why)

    def start(self) -> None:
        """Begins to work."""
        self._worker.start()

    def drain(self, seconds: float) -> None:
        """The worker's."""
        self._worker.drain(seconds)

    def cut_off(self) -> None:
        """As the worker does."""
        self._worker.cut_off()

    def stop(self, drain_seconds: float) -> None:
        """As the worker does."""
        self._worker.stop(drain_seconds)

    def _account(self, tenant: str) -> Account:
        return Account(f"tenant {tenant!r}", self._tenant_quota, self._clock)


def _cost(job: Job[Any]) -> Cost:
    if isinstance(job, GenerateJob):
        completions = job.n * len(job.prompts)
        return Cost(completions, sum(map(len, job.prompts)) + completions * job.sampling.max_new_tokens)
    if isinstance(job, ScoreJob | ForwardBackwardJob):
        return Cost(0, sum(len(row.tokens) for row in job.rows))
    return Cost()
