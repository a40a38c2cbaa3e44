"""What one tenant, and all of them together, may have at once: requests, completions, tokens a second, adapters.

A quota is asked before anything is queued or allocated. What a refusal says of waiting is true: a bucket of tokens says
exactly when it has some again; for the rest, and for the worker's queues, there is a `forecast`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from onebase.server.config import Quota
from onebase.server.errors import ResourceExhausted
from onebase.server.forecast import Forecast
from onebase.server.identity import caller
from onebase.server.jobs import BaseFacts, ForwardBackwardJob, GenerateJob, Job, ScoreJob, Work, WorkerStatus
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry, Registry

Clock = Callable[[], float]

SESSION_FULL = "SESSION_QUEUE_FULL"
"""The worker's reason where a session's share of the queue is used up."""
TRAINED_COPIES = 4
"""Copies of a trained adapter's parameters that its training needs: weights, gradients, two moments."""


class Bucket:
    """So many tokens a second, and a second's worth at once. A request may overdraw it; the next one waits for that.

    Args:
        rate: tokens a second.
        clock: seconds that only grow.
    """

    def __init__(self, rate: float, clock: Clock = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._level = rate
        self._at = clock()

    def wait(self) -> float:
        """Seconds until there is something in it; 0 if there is."""
        self._fill()
        return 0.0 if self._level > 0 else (1e-3 - self._level) / self._rate

    def take(self, tokens: int) -> None:
        """Takes tokens out, more than there are if need be."""
        self._fill()
        self._level -= tokens

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._rate, self._level + (now - self._at) * self._rate)
        self._at = now


@dataclass
class _Account:
    """What one tenant, or everybody, has now."""

    whose: str
    """How messages call it."""
    quota: Quota
    bucket: Bucket | None
    of_requests: Forecast
    of_completions: Forecast
    requests: int = 0
    completions: int = 0

    def check(self, completions: int) -> None:
        quota = self.quota
        if quota.requests and self.requests >= quota.requests:
            there = f"{self.requests} requests are under way"
            raise _full("requests", there, self.whose, quota.requests, self.of_requests.wait())
        over = self.completions + completions > quota.completions
        if quota.completions and completions > quota.completions:
            raise ResourceExhausted(
                "QUOTA_COMPLETIONS",
                f"the request wants {completions} completions, and {self.whose} may have {quota.completions} at once: "
                "ask for fewer prompts, or a smaller n",
                field="sampling.n",
            )
        if quota.completions and completions and over:
            there = f"{self.completions} completions are under way, and {completions} more are wanted"
            wait = self.of_completions.wait(self.completions + completions - quota.completions)
            raise _full("completions", there, self.whose, quota.completions, wait)
        if self.bucket is not None and (wait := self.bucket.wait()):
            raise _full("tokens_per_second", "more tokens were used", self.whose, quota.tokens_per_second, wait)

    def begin(self, cost: _Cost) -> Callable[[], None]:
        """Takes a request in; what is returned is called when it has ended."""
        self.requests += 1
        self.completions += cost.completions
        if self.bucket is not None:
            self.bucket.take(cost.tokens)
        request = self.of_requests.begin()
        completions = self.of_completions.begin(cost.completions) if cost.completions else None

        def end() -> None:
            self.requests -= 1
            self.completions -= cost.completions
            self.of_requests.end(request)
            if completions is not None:
                self.of_completions.end(completions)

        return end


@dataclass(frozen=True)
class _Cost:
    completions: int
    tokens: int


class QuotaWorker:
    """A worker that takes in no more than the quotas allow.

    Args:
        worker: does the work.
        tenant: what each tenant may have.
        whole: what all of them may have together.
        clock: seconds that only grow.
    """

    def __init__(self, worker: WorkerLike, tenant: Quota, whole: Quota, clock: Clock = time.monotonic) -> None:
        self._worker = worker
        self._tenant_quota = tenant
        self._clock = clock
        self._lock = threading.Lock()  # jobs end on the worker's thread
        self._whole = self._account("all clients together", whole)
        self._tenants: dict[str, _Account] = {}
        self._sessions: dict[str, Forecast] = {}  # of those with requests under way

    @property
    def facts(self) -> BaseFacts:
        """The worker's."""
        return self._worker.facts

    def submit(self, job: Job[Any]) -> None:
        """Queues a job, if its tenant and all of them may have it.

        Raises:
            ResourceExhausted: QUOTA_REQUESTS, QUOTA_COMPLETIONS, QUOTA_TOKENS_PER_SECOND; or the worker's, with a
                forecast of its queue.
            OnebaseError: the worker's.
        """
        if job.work is Work.ADMIN:
            return self._worker.submit(job)
        cost, tenant = _cost(job), caller().tenant
        with self._noted(job.session):
            accounts = self._asked(tenant, cost.completions)
            with self._told(job.session):
                self._worker.submit(job)
        with self._lock:
            self._tenants[tenant] = accounts[0]
            session = self._sessions.setdefault(job.session, Forecast(self._clock))
            ends = [account.begin(cost) for account in accounts]
            number = session.begin()
            ends.append(lambda: self._end_of_session(job.session, session, number))
        job.done.add_done_callback(lambda _: self._end(ends))
        return None

    def check(self, session: str) -> None:
        """Refuses at once whom `submit` would refuse however small his request is.

        Raises:
            ResourceExhausted: as `submit` does.
        """
        with self._noted(session):
            self._asked(caller().tenant, 0)
            with self._told(session):
                self._worker.check(session)

    def refused(self, tenant: str, session: str) -> None:
        """As the worker does."""
        self._worker.refused(tenant, session)

    def _asked(self, tenant: str, completions: int) -> tuple[_Account, _Account]:
        """The tenant's account and everybody's, if neither of them refuses."""
        with self._lock:
            mine = self._tenants.get(tenant) or self._account(f"tenant {tenant!r}", self._tenant_quota)
            for account in (mine, self._whole):
                account.check(completions)
        return mine, self._whole

    @contextlib.contextmanager
    def _noted(self, session: str) -> Iterator[None]:
        """Has who is refused pay for that."""
        try:
            yield
        except ResourceExhausted:
            self._worker.refused(caller().tenant, session)
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

    def _account(self, whose: str, quota: Quota) -> _Account:
        rate = quota.tokens_per_second
        bucket = Bucket(rate, self._clock) if rate else None
        return _Account(whose, quota, bucket, Forecast(self._clock), Forecast(self._clock))

    def _end(self, ends: Iterable[Callable[[], None]]) -> None:
        with self._lock:
            for end in ends:
                end()

    def _end_of_session(self, name: str, forecast: Forecast, number: int) -> None:
        forecast.end(number)
        if forecast.idle:
            self._sessions.pop(name, None)


def _cost(job: Job[Any]) -> _Cost:
    if isinstance(job, GenerateJob):
        completions = job.n * len(job.prompts)
        return _Cost(completions, sum(map(len, job.prompts)) + completions * job.sampling.max_new_tokens)
    if isinstance(job, ScoreJob | ForwardBackwardJob):
        return _Cost(0, sum(len(row.tokens) for row in job.rows))
    return _Cost(0, 0)


# ------------------------------------------------------------------------------------------------- adapters


@dataclass
class AdapterQuotas:
    """What adapters each tenant, and all of them together, may have. Runs on the event loop's thread."""

    registry: Registry
    tenant: Quota = field(default_factory=Quota)
    whole: Quota = field(default_factory=Quota)
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextlib.asynccontextmanager
    async def room(self, owner: str, replaced: Entry | None = None) -> AsyncIterator[int | None]:
        """Room for one adapter more, while it is being made: the most bytes it may take, or None for any.

        Args:
            owner: the tenant whose it will be.
            replaced: the adapter that goes when it has come; until then both are there.

        Raises:
            ResourceExhausted: QUOTA_ADAPTERS.
        """
        if not (self.tenant.limits_adapters or self.whole.limits_adapters):
            yield None
            return
        async with self._making:  # one after the other, so that two do not both take the last place
            left = []
            for whose, quota, there in (
                (f"tenant {owner!r}", self.tenant, self.registry.of_tenant(owner)),
                ("all clients together", self.whole, self.registry.of_tenant(None)),
            ):
                if quota.adapters and len(there) + (replaced is None) > quota.adapters:
                    raise ResourceExhausted(
                        "QUOTA_ADAPTERS",
                        f"{len(there)} adapters are there, and {whose} may have {quota.adapters}: delete one first",
                    )
                if quota.adapter_bytes:
                    left.append(max(0, quota.adapter_bytes - sum(_bytes(one) for one in there)))
            yield min(left, default=None)


def _bytes(entry: Entry) -> int:
    """What an adapter takes when it trains, as it was counted when it was let in."""
    return entry.facts.parameter_count * 4 * (TRAINED_COPIES if entry.kind.trained else 1)


def _full(what: str, there: str, whose: str, limit: float, retry: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"QUOTA_{what.upper()}",
        f"{there}, and {whose} may have {limit:g} {what.replace('_', ' ')}: wait for some of them",
        retry_after=retry,
    )
