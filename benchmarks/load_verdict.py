"""What a run under load has shown, and whether it keeps the bounds: pure functions on what the clients recorded."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_clients import DECK, REFUSED, UNFINISHED

TENANTS = [f"tenant-{number}" for number in range(1, 9)]
FLOODER, TIMES = TENANTS[-1], 10
WINDOW, SETTLE = 20.0, 4.0
"""Seconds of a calm or flooded window, and of a calm one's beginning, which still has the flood's queues."""
PIECE = 30.0
"""Seconds over which the fairness is looked at piece by piece."""
WARM = 0.15
"""The part of the time after which memory is looked at, and calls count."""
FEWEST = 50
"""Calls in calm, and in floods, without which a p95 says nothing: it would rest on fewer than three of them."""
FEWEST_POOLED = 10
"""Calls of one of the pooled methods, without which it has no median of its own to be measured by."""
FEWEST_IN_PIECE = 100
"""Calls of a tenant in a piece of time without which its tokens say more of the draw than of the server."""
PARTS = {
    "train": ("ForwardBackward", "OptimStep"),
    "adapter": ("CreateAdapter", "DeleteAdapter"),
    "session": ("OpenSession", "CloseSession"),
}
"""The methods of the deck's operations that are not called by their method's name."""
METHODS = sorted(method for operation in DECK for method in PARTS.get(operation, (operation,)))
POOLED = ("CloseSession", "CreateAdapter", "DeleteAdapter", "KeepAlive", "OpenSession")
"""Methods that come once among a hundred operations, some 40 times in all floods: the p95 of each would be its second
or third longest call, and the worst of five such figures mostly chance. More of them in the deck would be another load.
So they are judged together, each call in medians of its own method in calm: in seconds, CreateAdapter alone would be
all that a common p95 shows. Each is a fifth of the pool, so one that a flood starves alone still moves the p95."""
AT_MOST = {
    "errors": 0,
    "memory_growth": 0.05,
    "flood_p95": 2.0,
    "flood_uncounted": 0,
    "flood_errors": 0,
    "refusals_of_others": 0,
}
AT_LEAST = {"fairness": 0.95, "fairness_worst_piece": 0.95, "flood_sent": 0.9, "flood_refused": 1}


@dataclass(frozen=True)
class Call:
    """One line of the clients'."""

    at: float
    tenant: str
    method: str
    seconds: float
    tokens: int
    refusals: int
    error: str

    @property
    def began(self) -> float:
        """When it began; `at` is when it ended, or when nobody waited any more."""
        return self.at - self.seconds


@dataclass(frozen=True)
class Plan:
    """When what happens, on CLOCK_MONOTONIC."""

    begin: float
    steady: float
    windows: tuple[tuple[float, float], ...]
    """Calm and flooded ones by turns, the first is calm."""

    @property
    def calms(self) -> list[tuple[float, float]]:
        """The windows without a flood."""
        return list(self.windows[::2])

    @property
    def floods(self) -> list[tuple[float, float]]:
        """The flooded windows."""
        return list(self.windows[1::2])

    @property
    def end(self) -> float:
        """Of all."""
        return self.windows[-1][1] if self.windows else self.begin + self.steady


def plan(begin: float, minutes: float, flood_minutes: float) -> Plan:
    """So many minutes of steady load, then so many of windows, two at least if there are to be any."""
    first, pairs = begin + 60 * minutes, round(60 * flood_minutes / WINDOW / 2)
    pairs = max(pairs, 1 if flood_minutes else 0)
    return Plan(begin, 60 * minutes, tuple((first + n * WINDOW, first + (n + 1) * WINDOW) for n in range(2 * pairs)))


@dataclass(frozen=True)
class Found:
    """What was recorded."""

    plan: Plan
    calls: list[Call]
    flood: list[Call]
    rate: float
    memory: list[tuple[float, int]]
    """When, and resident bytes of the server."""
    cpu: float
    """The server's, in seconds per second of the steady part."""


# ------------------------------------------------------------------------------------------------ numbers


def jain(amounts: Sequence[float]) -> float:
    """Jain's fairness index: 1 where all have the same, 1/n where one has everything (Jain, Chiu, Hawe 1984)."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount**2 for amount in amounts) or 1)


def growth(memory: Sequence[tuple[float, int]]) -> float:
    """By how much memory grew over the time, as a part of its median: by Theil and Sen's slope, the pairs' median."""
    slopes = [(b - a) / (later - earlier) for n, (earlier, a) in enumerate(memory) for later, b in memory[n + 1 :]]
    median = statistics.median(held for _, held in memory)
    return statistics.median(slopes) * (memory[-1][0] - memory[0][0]) / median


def quantile(amounts: Sequence[float], part: int) -> float:
    """That of which so many percent are less."""
    return sorted(amounts)[min(len(amounts) - 1, len(amounts) * part // 100)]


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """How many there were, and p50, p95 and p99 in milliseconds if there were any."""
    at = {f"p{part}_ms": round(1000 * quantile(seconds, part), 1) for part in (50, 95, 99) if seconds}
    return {"calls": len(seconds), **at}


def by_method(calls: Sequence[Call]) -> dict[str, list[float]]:
    """Seconds of calls, however they ended: one that failed, or never ended, was waited for too."""
    found: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        found[call.method].append(call.seconds)
    return dict(sorted(found.items()))


def fairness(calls: Sequence[Call]) -> float:
    """Jain's index of the tokens that tenants were served."""
    served_tokens = Counter(dict.fromkeys(TENANTS, 0))
    for call in calls:
        served_tokens[call.tenant] += call.tokens
    return jain([served_tokens[tenant] for tenant in TENANTS])


def steady(found: Found) -> dict[str, Any]:
    """Of the time without a flood."""
    begin, end = found.plan.begin + WARM * found.plan.steady, found.plan.begin + found.plan.steady
    calls = [call for call in found.calls if begin <= call.at < end]
    pieces = []
    while begin + PIECE * len(pieces) + PIECE <= end:
        first = begin + PIECE * len(pieces)
        pieces.append(fairness([call for call in calls if first <= call.at < first + PIECE]))
    memory = [(at, held) for at, held in found.memory if begin <= at < end]
    return {
        "minutes": round(found.plan.steady / 60, 2),
        "calls_per_second": round(len(calls) / (end - begin), 1),
        "tokens_per_second": round(sum(call.tokens for call in calls) / (end - begin)),
        "server_cpu": round(found.cpu, 2),
        "refusals": sum(call.refusals for call in found.calls if call.at < end),
        "memory_mib": [round(held / 2**20) for held in (memory[0][1], memory[-1][1])],
        "memory_growth": round(growth(memory), 4),
        "fairness": round(fairness(calls), 4),
        "fairness_pieces": [round(piece, 4) for piece in pieces],
        "calls_of_a_tenant_in_a_piece": round(len(calls) / (end - begin) * PIECE / len(TENANTS)),
        "latency": {name: quantiles(seconds) for name, seconds in by_method(calls).items()},
    }


# ------------------------------------------------------------------------------------------------ the flood


def in_calm_and_flood(found: Found) -> tuple[list[Call], list[Call]]:
    """The others' calls that no flood has touched, and those that one has.

    A call belongs where it began, whenever it ended: what a flood holds back ends after it. One that began in calm and
    is still open when a flood begins is the flood's too, or clients that wait from its first moment to its last would
    not be seen. That gives the flood the longer of those calls, some four percent on the p95 of calls of three seconds
    in a window of twenty: it is said of the flood too much rather than too little.
    """
    calm, flood = [], []
    for call in found.calls:
        if call.tenant == FLOODER:
            continue
        if any(begin < call.at and call.began < until for begin, until in found.plan.floods):
            flood.append(call)
        elif any(begin + SETTLE <= call.began < until for begin, until in found.plan.calms):
            calm.append(call)
    return calm, flood


def compared(calm: Sequence[float], flood: Sequence[float]) -> dict[str, Any]:
    """How many calls there were, how much longer the flood's p95 is, and whether they are enough to say so."""
    enough = min(len(calm), len(flood)) >= FEWEST
    ratio = round(quantile(flood, 95) / max(quantile(calm, 95), 1e-6), 2) if calm and flood else None
    return {"p95_ratio": ratio, "counts": enough}


def pooled(calm: Mapping[str, list[float]], flood: Mapping[str, list[float]]) -> dict[str, Any]:
    """The same for the methods of POOLED together, each call in medians of its own method in calm."""
    methods = [one for one in POOLED if min(len(calm.get(one, ())), len(flood.get(one, ()))) >= FEWEST_POOLED]
    units = {one: max(statistics.median(calm[one]), 1e-6) for one in methods}
    sides = [[seconds / units[one] for one in methods for seconds in side[one]] for side in (calm, flood)]
    return {"methods": methods, "calls": [len(side) for side in sides], **compared(*sides)}


def flooded(found: Found) -> dict[str, Any]:
    """Of the windows: what the others waited with the flood and without, and what the flood was answered."""
    calls, touched = in_calm_and_flood(found)
    calm, flood = by_method(calls), by_method(touched)
    methods: dict[str, dict[str, Any]] = {}
    for name in sorted({*METHODS, *calm, *flood}):
        one, other = calm.get(name, []), flood.get(name, [])
        methods[name] = {"calm": quantiles(one), "flood": quantiles(other), **compared(one, other)}
        methods[name]["counts"] &= name not in POOLED
    pool = pooled(calm, flood)
    judged_together = pool["methods"] if pool["counts"] else []
    seconds = sum(until - begin for begin, until in found.plan.floods)
    outcomes = Counter(call.error.partition(":")[0] or "answered" for call in found.flood)
    others = Counter(call.error for call in found.flood if call.error not in ("", REFUSED, UNFINISHED))
    return {
        "rate_per_second": round(found.rate, 1),
        "sent_per_second": round(len(found.flood) / seconds, 1),
        "outcomes": dict(outcomes),
        "errors": dict(others.most_common(10)),
        "windows": len(found.plan.windows),
        "refusals_of_others": sum(call.refusals for call in touched),
        "others": methods,
        "pooled": pool,
        "uncounted": [name for name, one in methods.items() if not one["counts"] and name not in judged_together],
    }


# ------------------------------------------------------------------------------------------------ bounds


def bound(name: str, value: float | None, which: object = None) -> dict[str, Any]:
    """One line of the verdict. What could not be measured (None) is not met.

    Args:
        name: of AT_MOST or AT_LEAST.
        value: what was seen.
        which: what made it so.
    """
    limit = AT_MOST[name] if name in AT_MOST else AT_LEAST[name]
    met = value is not None and (value <= limit if name in AT_MOST else value >= limit)
    return {"value": value, "bound": limit, "met": met, **({"which": which} if which else {})}


def judged(found: Found, of_steady: dict[str, Any], of_flood: dict[str, Any] | None) -> dict[str, Any]:
    """Each bound, what was seen, and whether it is met."""
    errors = Counter(f"{call.method}: {call.error}" for call in found.calls if call.error)
    calls, pieces = of_steady["calls_of_a_tenant_in_a_piece"], of_steady["fairness_pieces"]
    few = f"{calls} calls of a tenant in each of {len(pieces)} pieces: fewer than {FEWEST_IN_PIECE}, or no piece"
    enough = pieces and calls >= FEWEST_IN_PIECE
    bounds = {
        "errors": bound("errors", errors.total(), dict(errors.most_common(10))),
        "memory_growth": bound("memory_growth", of_steady["memory_growth"]),
        "fairness": bound("fairness", of_steady["fairness"]),
        "fairness_worst_piece": bound("fairness_worst_piece", min(pieces) if enough else None, None if enough else few),
    }
    if of_flood is None:
        return bounds
    counted = {name: one["p95_ratio"] for name, one in of_flood["others"].items() if one["counts"]}
    if of_flood["pooled"]["counts"]:
        counted[", ".join(of_flood["pooled"]["methods"])] = of_flood["pooled"]["p95_ratio"]
    worst = max(counted, key=lambda name: counted[name], default="no method has calls enough")
    sent = of_flood["sent_per_second"] / max(of_flood["rate_per_second"], 1e-6)
    return bounds | {
        "flood_p95": bound("flood_p95", counted.get(worst), worst),
        "flood_uncounted": bound("flood_uncounted", len(of_flood["uncounted"]), of_flood["uncounted"]),
        "refusals_of_others": bound("refusals_of_others", of_flood["refusals_of_others"]),
        "flood_sent": bound("flood_sent", round(sent, 3)),
        "flood_refused": bound("flood_refused", of_flood["outcomes"].get(REFUSED, 0)),
        "flood_errors": bound("flood_errors", _errors(of_flood["outcomes"]), of_flood["errors"]),
    }


def _errors(outcomes: Mapping[str, int]) -> int:
    """What the flood was told besides answers and refusals; what it left open when its window ended is neither."""
    return sum(count for what, count in outcomes.items() if what not in ("answered", REFUSED, UNFINISHED))
