"""Sessions and their leases: who may change an adapter, for how long, and what a session has made active."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

from history.journal import MAKING, OK, Attempt, Op
from history.model import Model, Violation, answered

_CHANGES = frozenset({"pass", "step", "delete"})
"""Operations that need the lease, and name what is there."""
_SET_ACTIVE = frozenset({"active", "score", "reward", "open"})
_LATE = 0.5
"""Seconds by which a session may seem to have lived too long: a call in flight keeps it."""

Calls = Mapping[str, list[tuple[Op, Attempt]]]
"""By session, in their order: the attempts that named it."""


def leases(model: Model) -> Iterator[Violation]:
    """No two sessions change one adapter while both may hold its lease."""
    calls = calls_of(model)
    for key in model.chains:
        users = [
            (op, attempt)
            for op, attempt in answered(model.history.about(*key, *_CHANGES))
            if op.session and op.attempts.index(attempt) == 0
        ]
        users.sort(key=lambda one: one[1].ended or 0.0)
        enders = [one for one in model.history.about(*key, "delete", *MAKING) if one.ok is not None or one.unknown]
        for (one, first), (other, second) in pairwise(users):
            if one.session == other.session or not held_on(model, calls, one, first, second):
                continue
            if any(
                by.began < (second.ended or math.inf) and model.history.end_of(by) > first.began
                for by in enders
                if by is not other
            ):
                continue  # it may be another adapter by then
            what = f"two sessions changed {key[0]}'s {key[1]} while the first held its lease"
            yield Violation("a lease held twice", what, (one, other))


def calls_of(model: Model) -> Calls:
    """The calls of every session."""
    found: dict[str, list[tuple[Op, Attempt]]] = defaultdict(list)
    for op in model.history.ops:
        session = op.session or (str(op.ok.answer["session"]) if op.kind == "open" and op.ok else "")
        for attempt in op.attempts:
            if session:
                found[session].append((op, attempt))
    return {session: sorted(calls, key=lambda one: one[1].began) for session, calls in found.items()}


def held_on(model: Model, calls: Calls, op: Op, first: Attempt, second: Attempt) -> bool:
    """Whether a session that held a lease at `first` still did at `second`, for certain."""
    if second.began <= (first.ended or math.inf):
        return False  # they overlap: the order is not known
    ttl = ttl_of(calls[op.session])
    at = first.ended or 0.0
    for one, attempt in calls[op.session]:
        if attempt.began > (second.ended or math.inf):
            break
        if one.kind == "close" and (attempt.ended or math.inf) > at:
            return False
        if attempt.began > at and attempt.began - at < ttl:
            at = max(at, attempt.ended or attempt.began) if attempt.code == OK else at
    return (second.ended or math.inf) - at < ttl - _LATE


def ttl_of(calls: list[tuple[Op, Attempt]]) -> float:
    return min((attempt.answer["ttl"] for _, attempt in calls if "ttl" in attempt.answer), default=60.0)


def sessions(model: Model) -> Iterator[Violation]:
    """A session lives for its ttl, and its active adapter is what it set."""
    for session, calls in calls_of(model).items():
        ttl, last, active, shaky = ttl_of(calls), 0.0, None, False
        closing = False
        for op, attempt in calls:
            closing = closing or op.kind == "close"
            resumed = op.kind == "open" and op.args.get("resume")
            if attempt.reason == "SESSION_NOT_FOUND":
                if last and not closing and (attempt.ended or math.inf) - last < ttl - _LATE:
                    what = f"session {session[:6]} lives for {ttl:g} s without a call, and ended sooner"
                    yield Violation("a session that was lost", what, (op,))
                break
            if attempt.code == OK:
                last = max(last, attempt.began)
            if op.kind in _SET_ACTIVE and attempt.code != OK and op.name:
                shaky = True
            elif attempt.code == OK and "active" in attempt.answer:
                now = attempt.answer["active"]
                sets = op.kind in _SET_ACTIVE and op.name
                if not sets and active is not None and now != active and not shaky:
                    what = f"session {session[:6]} had set {active!r}, and has {now!r}"
                    yield Violation("another active adapter", what, (op,))
                if sets and now != op.name and not resumed:
                    yield Violation("another active adapter", f"it set {op.name!r}, and has {now!r}", (op,))
                active, shaky = now, False
