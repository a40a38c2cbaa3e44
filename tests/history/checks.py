"""What must hold of every history, whatever the timing was. Numbers are `replay`'s to check."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from history.journal import AMBIGUOUS, DURABLE, MAKING, OK, Attempt, Op
from history.model import Life, Model, Violation, answered

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
    for life in model.all():
        for op, attempt, _ in life.seen:
            if attempt.began > life.dead and op is not life.maker:
                ends = model.history.about(life.tenant, life.name, "delete")
                what = f"{life} was gone for certain by {life.dead:.3f}, and was seen after that"
                yield Violation("a resurrected adapter", what, (op, *ends[-3:]))
                break
    for op in model.history.ops:
        for attempt in op.attempts:
            if attempt.reason == "ADAPTER_NOT_FOUND" and attempt.ended is not None and op.name:
                life = _surely_there(model, op, attempt)
                if life is not None and not (op.kind == "create" and "init_from" in op.args):
                    what = f"{life} was there for certain, and {op.tenant} was told that it is not"
                    makers = (life.maker,) if life.maker else ()
                    yield Violation("an adapter that disappeared", what, (op, *makers))


def _surely_there(model: Model, op: Op, attempt: Attempt) -> Life | None:
    """A life that nobody can have ended before an attempt was answered, and that had begun before it."""
    assert attempt.ended is not None
    for life in model.lives.get((op.tenant, op.name), ()):
        if life.known < attempt.began and attempt.ended < life.dead:
            enders = [
                one
                for one in model.history.about(life.tenant, life.name, "delete", *MAKING)
                if (one.kind == "delete" or one.args.get("replace"))
                and (one.ok is not None or one.unknown)
                and one is not life.maker
                and one.began < attempt.ended
                and model.history.end_of(one) > life.created - model.history.clock
            ]
            if not enders:
                return life
    return None


def _order(model: Model) -> Iterator[Violation]:
    """Versions never go back, and none is seen before it was asked for."""
    for life in model.all():
        asked = {version: step.op for version, step in life.steps.items()}
        highest: tuple[int, Op | None] = (life.first, life.maker)
        ended = sorted((one for one in life.seen if one[1].ended is not None), key=lambda one: one[1].ended or 0.0)
        began = sorted(life.seen, key=lambda one: one[1].began)
        at = 0
        for op, attempt, version in began:
            while at < len(ended) and (ended[at][1].ended or 0.0) < attempt.began:
                if ended[at][2] > highest[0]:
                    highest = (ended[at][2], ended[at][0])
                at += 1
            if version < highest[0]:
                other = (highest[1],) if highest[1] is not None else ()
                what = f"{life} was at version {highest[0]} and then at {version}"
                yield Violation("a version that was lost", what, (op, *other))
                break
        for op, attempt, version in life.seen:
            maker = asked.get(version)
            if maker is not None and (attempt.ended or math.inf) < maker.began:
                what = f"version {version} of {life} was seen before anybody asked for it"
                yield Violation("a version too early", what, (op, maker))


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
    for life in model.all():
        users = [
            (op, attempt)
            for op, attempt in answered(model.history.about(life.tenant, life.name, *_CHANGES))
            if op.session and life.known <= attempt.began and (attempt.ended or math.inf) <= life.dead
            and not op.may_be_kept(attempt)
        ]  # fmt: skip
        users.sort(key=lambda one: one[1].ended or 0.0)
        for (one, first), (other, second) in pairwise(users):
            if one.session == other.session or not _held_on(model, calls, one, first, second):
                continue
            what = f"two sessions changed {life} while the first held its lease"
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
    owners: dict[float, Life] = {}
    for life in model.all():
        other = owners.setdefault(life.created, life)
        if other.tenant != life.tenant:
            ops = (life.seen[0][0], other.seen[0][0]) if life.seen and other.seen else ()
            yield Violation("another tenant's adapter", f"{life} is also {other}", ops)


# ------------------------------------------------------------------------------------------------------------ refusals


def _refusals(model: Model) -> Iterator[Violation]:
    """The server itself says why it refuses, and none of these is a reason: nothing here was damaged or is a bug."""
    for op in model.history.ops:
        for attempt in op.attempts:
            if attempt.reason and attempt.code in ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAUTHENTICATED"):
                yield Violation("an answer that no page declares", f"{attempt.code} {attempt.reason}", (op,))
