"""What one tenant, or all of them together, have under way now, and what they may have: requests, completions, tokens.

What a refusal says of waiting is true: a bucket of tokens says exactly when it has some again; for the rest there is a
`forecast`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from onebase.server.config import Quota
from onebase.server.errors import ResourceExhausted
from onebase.server.forecast import Forecast

Clock = Callable[[], float]

FILES_AT_ONCE = 32
"""So many adapters a tenant may have made, read or written for it at once."""


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

    def give_back(self, tokens: int) -> None:
        """Of what was taken and not used."""
        self._fill()
        self._level = min(self._rate, self._level + tokens)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._rate, self._level + (now - self._at) * self._rate)
        self._at = now


@dataclass(frozen=True)
class Cost:
    """What a request asks for."""

    completions: int = 0
    tokens: int = 0


@dataclass
class Account:
    """What one tenant, or everybody, has now."""

    whose: str
    """How messages call it."""
    quota: Quota
    clock: Clock
    requests: int = 0
    completions: int = 0
    files: int = 0
    of_requests: Forecast = field(init=False)
    of_completions: Forecast = field(init=False)
    _bucket: Bucket | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.of_requests, self.of_completions = Forecast(self.clock), Forecast(self.clock)
        if rate := self.quota.tokens_per_second:
            self._bucket = Bucket(rate, self.clock)

    def check(self, *, files: bool = False) -> None:
        """Whether there may be one request more.

        Raises:
            ResourceExhausted: QUOTA_REQUESTS; QUOTA_TOKENS_PER_SECOND.
        """
        quota = self.quota
        if quota.requests and self.requests >= quota.requests:
            there = f"{self.requests} requests are under way"
            raise _full("requests", there, self.whose, quota.requests, self.of_requests.wait())
        if files and self.files >= FILES_AT_ONCE:
            there = f"{self.files} adapters are made, read or written"
            raise _full("requests", there, self.whose, FILES_AT_ONCE, self.of_requests.wait())
        if not files:
            self._check_tokens()

    def check_cost(self, cost: Cost) -> None:
        """Whether one of its requests may have what it asks for.

        Raises:
            ResourceExhausted: QUOTA_COMPLETIONS; QUOTA_TOKENS_PER_SECOND.
        """
        most, wanted = self.quota.completions, cost.completions
        if most and wanted > most:
            raise ResourceExhausted(
                "QUOTA_COMPLETIONS",
                f"the request wants {wanted} completions, and {self.whose} may have {most} at once: "
                "ask for fewer prompts, or a smaller n",
                field="sampling.n",
            )
        if most and wanted and self.completions + wanted > most:
            there = f"{self.completions} completions are under way, and {wanted} more are wanted"
            wait = self.of_completions.wait(self.completions + wanted - most)
            raise _full("completions", there, self.whose, most, wait)
        if cost.tokens:
            self._check_tokens()

    def _check_tokens(self) -> None:
        if self._bucket is not None and (wait := self._bucket.wait()):
            raise _full("tokens_per_second", "more tokens were used", self.whose, self.quota.tokens_per_second, wait)

    def enter(self, *, files: bool = False) -> Callable[[bool], None]:
        """Takes a request in; what is returned is called when it has ended, and told whether it was ever work."""
        self.requests += 1
        self.files += files
        number = self.of_requests.begin()

        def leave(worked: bool) -> None:
            self.requests -= 1
            self.files -= files
            self.of_requests.end(number, counts=worked)

        return leave

    def begin(self, cost: Cost) -> Callable[[bool], None]:
        """Takes in what a request asks for; what is returned is called when it has ended, and told whether in vain."""
        self.completions += cost.completions
        if self._bucket is not None:
            self._bucket.take(cost.tokens)
        number = self.of_completions.begin(cost.completions) if cost.completions else None

        def end(in_vain: bool) -> None:
            self.completions -= cost.completions
            if number is not None:
                self.of_completions.end(number)
            if in_vain and self._bucket is not None:
                self._bucket.give_back(cost.tokens)

        return end


def _full(what: str, there: str, whose: str, limit: float, retry: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"QUOTA_{what.upper()}",
        f"{there}, and {whose} may have {limit:g} {what.replace('_', ' ')}: wait for some of them",
        retry_after=retry,
    )
