"""What must hold of every history, whatever the timing was. Numbers are `replay`'s to check."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from history.journal import AMBIGUOUS, DURABLE, MAKING, OK, Attempt, Op
from history.model import Model, Violation, answered, times_of_making

_CHANGES = frozenset({"pass", "step", "delete"})
"""Operations that need the lease, and name what is there."""
_SET_ACTIVE = frozenset({"active", "score", "reward", "open"})
_LATE = 0.5
"""Seconds by which a session may seem to have lived too long: a call in flight keeps it."""


def check(model: Model) -> list[Violation]:
    """All that is wrong."""
    return [
        *model.violations,
        *_existence(model),
        *_order(model),
        *_once(model),
        *_leases(model),
        *_sessions(model),
        *_tenants(model),
        *_refusals(model),
    ]


# ------------------------------------------------------------------------------------------------------------ adapters


def _existence(model: Model) -> Iterator[Violation]:
    """What was deleted does not come back, and what nobody deleted is there."""
    for chain in model.chains.values():
        deletes = model.history.about(*chain.key, "delete")
        for delete in deletes:
            if (ok := delete.ok) is None or ok.ended is None:
                continue
            gone = max((one.version for one in chain.seen if one.until < delete.began), default=-1)
            again = next((one for one in chain.seen if one.since > ok.ended and one.version <= gone), None)
            if again is not None:
                what = (
                    f"{chain.key[0]} deleted {chain.key[1]!r} at version {gone}, and saw version {again.version} then"
                )
                yield Violation("a resurrected adapter", what, (delete, again.op))
        possible = [one for one in deletes if one.ok is not None or one.unknown]
        for op in model.history.about(*chain.key):
            for attempt in op.attempts:
                before = [one for one in chain.seen if one.until < attempt.began]
                if attempt.reason != "ADAPTER_NOT_FOUND" or attempt.ended is None or "init_from" in op.args:
                    continue
                there = max(before, key=lambda one: one.since, default=None)
                if there is not None and not any(
                    one.began < attempt.ended and model.history.end_of(one) > there.since for one in possible
                ):
                    what = f"{chain.key[1]!r} was there for certain, and {op.tenant} was told that it is not"
                    yield Violation("an adapter that disappeared", what, (there.op, op))


def _order(model: Model) -> Iterator[Violation]:
    """Versions never go back, and none is seen before it was asked for."""
    for chain in model.chains.values():
        ended = sorted(chain.seen, key=lambda one: one.until)
        highest, at = ended[0], 0
        for one in sorted(chain.seen, key=lambda one: one.since):
            while at < len(ended) and ended[at].until < one.since:
                highest = max(highest, ended[at], key=lambda one: one.version)
                at += 1
            if at and one.version < highest.version:
                what = f"{chain.key[0]}'s {chain.key[1]} was at version {highest.version} and then at {one.version}"
                yield Violation("a version that was lost", what, (highest.op, one.op))
                break
        asked = {
            version: min((way.op.began for way in ways if way.op), default=-math.inf)
            for life in chain.lives
            for version, ways in life.origins.items()
        }
        for one in chain.seen:
            if one.until < asked.get(one.version, -math.inf):
                what = f"version {one.version} of {chain.key[0]}'s {chain.key[1]} was seen before anybody asked for it"
                yield Violation("a version too early", what, (one.op,))


# ------------------------------------------------------------------------------------------------------------ once


def _once(model: Model) -> Iterator[Violation]:
    for op in model.history.ops:
        if op.kind == "reuse":
            last = op.attempts[-1]
            if op.args["of"] not in DURABLE and last.epoch != op.args["epoch"]:
                continue  # the answer has gone with the server that gave it
            allowed = AMBIGUOUS | {"NOT_FOUND"}
            if last.reason != "REQUEST_ID_REUSED" and last.code not in allowed:
                what = f"a request_id with another payload got {last.code} {last.reason}"
                yield Violation("a request_id reused", what, (op,))
        elif op.request_id and (first := op.ok) is not None:
            for attempt in op.attempts[op.attempts.index(first) + 1 :]:
                if op.kind not in DURABLE and attempt.epoch != first.epoch:
                    continue
                same = attempt.code == OK and attempt.answer["raw"] == first.answer["raw"]
                if not same and attempt.code not in AMBIGUOUS and attempt.reason != "SESSION_NOT_FOUND":
                    yield Violation("another answer to a repeated call", f"{op.kind} {op.request_id}", (op,))


# ------------------------------------------------------------------------------------------------------------ sessions


def _leases(model: Model) -> Iterator[Violation]:
    """No two sessions change one adapter while both may hold its lease."""
    calls = _calls(model)
    for key in model.chains:
        users = [
            (op, attempt)
            for op, attempt in answered(model.history.about(*key, *_CHANGES))
            if op.session and op.attempts.index(attempt) == 0
        ]
        users.sort(key=lambda one: one[1].ended or 0.0)
        enders = [one for one in model.history.about(*key, "delete", *MAKING) if one.ok is not None or one.unknown]
        for (one, first), (other, second) in pairwise(users):
            if one.session == other.session or not _held_on(model, calls, one, first, second):
                continue
            if any(
                by.began < (second.ended or math.inf) and model.history.end_of(by) > first.began
                for by in enders
                if by is not other
            ):
                continue  # it may be another adapter by then
            what = f"two sessions changed {key[0]}'s {key[1]} while the first held its lease"
            yield Violation("a lease held twice", what, (one, other))


def _calls(model: Model) -> dict[str, list[tuple[Op, Attempt]]]:
    found: dict[str, list[tuple[Op, Attempt]]] = defaultdict(list)
    for op in model.history.ops:
        session = op.session or (str(op.ok.answer["session"]) if op.kind == "open" and op.ok else "")
        for attempt in op.attempts:
            if session:
                found[session].append((op, attempt))
    return {session: sorted(calls, key=lambda one: one[1].began) for session, calls in found.items()}


def _held_on(model: Model, calls: dict[str, list[tuple[Op, Attempt]]], op: Op, first: Attempt, second: Attempt) -> bool:
    """Whether a session that held a lease at `first` still did at `second`, for certain."""
    if second.began <= (first.ended or math.inf):
        return False  # they overlap: the order is not known
    ttl = _ttl(calls[op.session])
    at = first.ended or 0.0
    for one, attempt in calls[op.session]:
        if attempt.began > (second.ended or math.inf):
            break
        if one.kind == "close" and (attempt.ended or math.inf) > at:
            return False
        if attempt.began > at and attempt.began - at < ttl:
            at = max(at, attempt.ended or attempt.began) if attempt.code == OK else at
    return (second.ended or math.inf) - at < ttl - _LATE


def _ttl(calls: list[tuple[Op, Attempt]]) -> float:
    return min((attempt.answer["ttl"] for _, attempt in calls if "ttl" in attempt.answer), default=60.0)


def _sessions(model: Model) -> Iterator[Violation]:
    for session, calls in _calls(model).items():
        ttl, last, active, shaky = _ttl(calls), 0.0, None, False
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


# ------------------------------------------------------------------------------------------------------------ tenants


def _tenants(model: Model) -> Iterator[Violation]:
    """What one tenant alone has is not there for the other; a session belongs to its tenant."""
    for op, attempt in answered(model.history.ops):
        foreign = op.name.startswith("only_") and op.name != f"only_{op.tenant}"
        if foreign and op.kind != "reuse":
            yield Violation("another tenant's adapter", f"{op.tenant} was answered about {op.name!r}", (op,))
        for name, _, _ in attempt.answer.get("adapters", ()):
            if name.startswith("only_") and name != f"only_{op.tenant}":
                yield Violation("another tenant's adapter", f"{op.tenant} was shown {name!r}", (op,))
    owners: dict[float, tuple[str, Op]] = {}
    for (tenant, name), created, op in times_of_making(model.history):
        other, before = owners.setdefault(created, (tenant, op))
        if other != tenant:
            what = f"{name!r} of {created:.3f} is shown to {tenant} and to {other}"
            yield Violation("another tenant's adapter", what, (before, op))


# ------------------------------------------------------------------------------------------------------------ refusals


def _refusals(model: Model) -> Iterator[Violation]:
    """The server itself says why it refuses, and none of these is a reason: nothing here was damaged or is a bug."""
    for op in model.history.ops:
        for attempt in op.attempts:
            if attempt.reason and attempt.code in ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAUTHENTICATED"):
                yield Violation("an answer that no page declares", f"{attempt.code} {attempt.reason}", (op,))
