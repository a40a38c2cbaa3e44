"""What one tenant, and all of them together, may have at once: requests, completions, tokens a second, adapters.

A quota is asked before anything is queued or allocated. What a refusal says of waiting is true: a bucket of tokens says
exactly when it has some again; for the rest it is how long the tenant's requests take to end of late.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from onebase.server.config import Quota
from onebase.server.errors import ResourceExhausted
from onebase.server.identity import caller
from onebase.server.jobs import BaseFacts, ForwardBackwardJob, GenerateJob, Job, ScoreJob, Work, WorkerStatus
from onebase.server.meter import Meter
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry, Registry

Clock = Callable[[], float]

TRAINED_COPIES = 4
"""Copies of a trained adapter's parameters that its training needs: weights, gradients, two moments."""
_SHORTEST, _LONGEST = 0.05, 30.0  # seconds that a client is told to wait where it is an estimate


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
    finished: Meter
    requests: int = 0
    completions: int = 0

    def check(self, completions: int) -> None:
        quota, retry = self.quota, min(_LONGEST, max(_SHORTEST, 1 / (self.finished.rate() or 1.0)))
        if quota.requests and self.requests >= quota.requests:
            raise _full("requests", f"{self.requests} requests are under way", self.whose, quota.requests, retry)
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
            raise _full("completions", there, self.whose, quota.completions, retry)
        if self.bucket is not None and (wait := self.bucket.wait()):
            raise _full("tokens_per_second", "more tokens were used", self.whose, quota.tokens_per_second, wait)


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

    @property
    def facts(self) -> BaseFacts:
        """The worker's."""
        return self._worker.facts

    def submit(self, job: Job[Any]) -> None:
        """Queues a job, if its tenant and all of them may have it.

        Raises:
            ResourceExhausted: QUOTA_REQUESTS, QUOTA_COMPLETIONS, QUOTA_TOKENS_PER_SECOND; or the worker's.
            OnebaseError: the worker's.
        """
        if job.work is Work.ADMIN:
            return self._worker.submit(job)
        cost, tenant = _cost(job), caller().tenant
        with self._lock:
            mine = self._tenants.get(tenant) or self._account(f"tenant {tenant!r}", self._tenant_quota)
            accounts = (mine, self._whole)
            for account in accounts:
                account.check(cost.completions)
            self._tenants[tenant] = mine
            for account in accounts:
                account.requests += 1
                account.completions += cost.completions
                if account.bucket is not None:
                    account.bucket.take(cost.tokens)
        try:
            self._worker.submit(job)
        except BaseException:
            self._end(accounts, cost)
            raise
        job.done.add_done_callback(lambda _: self._end(accounts, cost))
        return None

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

    def stop(self, drain_seconds: float) -> None:
        """As the worker does."""
        self._worker.stop(drain_seconds)

    def _account(self, whose: str, quota: Quota) -> _Account:
        rate = quota.tokens_per_second
        return _Account(whose, quota, Bucket(rate, self._clock) if rate else None, Meter(clock=self._clock))

    def _end(self, accounts: Iterable[_Account], cost: _Cost) -> None:
        with self._lock:
            for account in accounts:
                account.requests -= 1
                account.completions -= cost.completions
                account.finished.add(1)


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
