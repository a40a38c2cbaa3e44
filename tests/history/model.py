"""What a history says there was: of every name the versions, one after the other, and who made each.

A version of a name is given once, whatever becomes of its adapters, so an answer that tells a version tells which
adapter it is about. Most versions were made by an operation that was answered. Others were seen, and whoever made
them never learned it: then each operation of unknown outcome that can have made such a version is an option, and the
replay finds out which of them explains the numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

from history.journal import AMBIGUOUS, MAKING, OK, Attempt, History, Op

OPERATORS = frozenset({"reward"})
"""Adapters that everybody may read."""
_SLACK = 0.05
"""Seconds by which two clocks may differ."""
_MOST_PASSES = 6
"""Of so many passes whose outcome nobody learned, each subset is tried."""

Key = tuple[str, str]
"""A tenant, and a name of its own."""


@dataclass(frozen=True)
class Violation:
    """Something that must not be, and the operations around it."""

    rule: str
    what: str
    ops: tuple[Op, ...] = ()

    def lines(self) -> list[str]:
        """For people: what, then the operations in their order."""
        around = sorted({op.id: op for op in self.ops}.values(), key=lambda op: op.began)
        return [f"{self.rule}: {self.what}", *(f"    {describe(op)}" for op in around)]


def describe(op: Op) -> str:
    """An operation in a line."""
    tries = "; ".join(
        f"epoch {one.epoch} {one.began:.3f}…{one.ended or math.nan:.3f} {one.code or 'no answer'} {one.reason} "
        f"{ {key: value for key, value in one.answer.items() if key in ('version', 'created', 'pending', 'active')} }"
        for one in op.attempts
    )
    args = {key: value for key, value in op.args.items() if key != "files"}
    return f"{op.id} {op.tenant} {op.kind} {args} session {op.session[:6]}: {tries}"


@dataclass(frozen=True)
class Seen:
    """An answer that tells a version: it was the newest at some time from `since` to `until`."""

    op: Op
    attempt: Attempt
    version: int

    @cached_property
    def since(self) -> float:
        """When it was asked for; of an answer that may have been kept, when it was asked for first."""
        return self.op.began if self.op.request_id else self.attempt.began

    @property
    def until(self) -> float:
        """When it was answered."""
        return self.attempt.ended or math.inf


@dataclass(frozen=True)
class Origin:
    """One way in which a version can have come to be."""

    op: Op | None
    """The step, or what made an adapter; None: it never was."""
    passes: tuple[Op, ...] = ()
    """What the step took in, in order."""
    base: tuple[Key, int] | None = None
    """Of a copy: which version of what it began as."""


@dataclass(eq=False)
class Life:
    """A name's versions from one adapter that was made for certain to the next."""

    key: Key
    first: int
    origins: dict[int, list[Origin]] = field(default_factory=dict)
    """By version, in order: the ways in which it can have come to be."""
    reads: dict[int, list[tuple[Op, Attempt]]] = field(default_factory=lambda: defaultdict(list))
    """By version: answers with its numbers."""

    @property
    def last(self) -> int:
        """The highest version."""
        return max(self.origins, default=self.first)

    @property
    def began(self) -> float:
        """When it was asked for first."""
        return min((origin.op.began for origin in self.origins.get(self.first, ()) if origin.op), default=0.0)

    def __str__(self) -> str:
        return f"{self.key[0]}'s {self.key[1]} from version {self.first}"


@dataclass(eq=False)
class Chain:
    """All that was seen of a name, and the lives that it makes."""

    key: Key
    seen: list[Seen] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)

    def origins(self, version: int) -> list[Origin]:
        """How a version can have come to be; nothing where it was never seen."""
        return next((life.origins[version] for life in self.lives if version in life.origins), [])


@dataclass
class Model:
    """The names and their versions, and what speaks against them."""

    history: History
    chains: dict[Key, Chain] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)

    def all(self) -> Iterator[Life]:
        """Every life, the oldest first."""
        yield from sorted((one for chain in self.chains.values() for one in chain.lives), key=lambda one: one.began)

    def wrong(self, rule: str, what: str, *ops: Op) -> None:
        """Notes a violation."""
        self.violations.append(Violation(rule, what, ops))


def answered(ops: Iterable[Op]) -> Iterator[tuple[Op, Attempt]]:
    """Every attempt that was answered with a result."""
    for op in ops:
        for attempt in op.attempts:
            if attempt.code == OK and attempt.ended is not None:
                yield op, attempt


def build(history: History) -> Model:
    """Finds the versions that there were, and how each can have come to be."""
    model = Model(history)
    for key, seen in _sights(history).items():
        model.chains[key] = Chain(key, seen)
    _check_times_of_making(model)
    for chain in model.chains.values():
        _find_lives(model, chain)
    for chain in model.chains.values():
        for life in chain.lives:
            for version, origins in life.origins.items():
                life.origins[version] = [way for origin in origins for way in _with_bases(model, origin)]
    return model


# --------------------------------------------------------------------------------------------------------------- seen


def _sights(history: History) -> dict[Key, list[Seen]]:
    """Every version that an answer tells, by name."""
    found: dict[Key, list[Seen]] = defaultdict(list)
    for op, attempt in answered(history.ops):
        answer: dict[str, Any] = attempt.answer
        for name, _, version in answer.get("adapters", ()):
            if name not in OPERATORS:
                found[op.tenant, name].append(Seen(op, attempt, version))
        if op.name and op.name not in OPERATORS and "version" in answer:
            versions = answer.get("versions") or [answer["version"]]
            found[op.tenant, op.name] += [Seen(op, attempt, version) for version in versions]
    return found


def times_of_making(history: History) -> Iterator[tuple[Key, float, Op]]:
    """Each time of a making that an answer tells, and the operation that asked."""
    for op, attempt in answered(history.ops):
        for name, created, _ in attempt.answer.get("adapters", ()):
            if name not in OPERATORS:
                yield (op.tenant, name), created, op
        if "created" in attempt.answer and op.name not in OPERATORS:
            yield (op.tenant, op.name), attempt.answer["created"], op


def _check_times_of_making(model: Model) -> None:
    """Every adapter that is shown was made by somebody, at the time that it says."""
    history, known = model.history, set()
    for key in model.chains:
        made = (op.ok for op in history.about(*key, *MAKING))
        known |= {(key, ok.answer["created"]) for ok in made if ok is not None}
    for key, created, op in times_of_making(history):
        if (key, created) in known:
            continue
        known.add((key, created))
        at = created - history.clock
        makers = (one for one in history.about(*key, *MAKING) if one.unknown)
        if not any(one.began - _SLACK <= at <= history.end_of(one) + _SLACK for one in makers):
            what = f"{key[0]} sees {key[1]!r} made at {created:.3f}, and nobody of {key[0]} made it"
            model.wrong("an adapter that nobody made", what, op)


# ------------------------------------------------------------------------------------------------------------ versions


def _find_lives(model: Model, chain: Chain) -> None:
    certain = _certain(model, chain)
    steps = {version for version, op in certain.items() if op.kind == "step"}
    there = {one.version for one in chain.seen} | set(certain) | {version - 1 for version in steps}
    firsts = sorted({version for version, op in certain.items() if op.kind in MAKING} | {min(there)})
    for first, after in zip(firsts, [*firsts[1:], None], strict=True):
        life = Life(chain.key, first)
        own = {version for version in there if first <= version and (after is None or version < after)}
        until = max(own) + (max(own) + 1 != after)  # one more than was seen can be what a copy began as
        _find_origins(model, chain, life, own, certain, until)
        chain.lives.append(life)
    by_version = {version: life for life in chain.lives for version in life.origins}
    for one in chain.seen:
        numbers = one.op.kind not in ("pass", "reward", "save", "step", "list", "get", *MAKING)
        if numbers and one.version in by_version and len(one.attempt.answer.get("versions", [0])) == 1:
            by_version[one.version].reads[one.version].append((one.op, one.attempt))


def _certain(model: Model, chain: Chain) -> dict[int, Op]:
    """The versions whose maker was told so."""
    found: dict[int, Op] = {}
    for op in model.history.about(*chain.key, "step", *MAKING):
        if (ok := op.ok) is None:
            continue
        version = ok.answer["version"]
        if (other := found.setdefault(version, op)) is not op:
            what = f"version {version} of {chain.key[0]}'s {chain.key[1]!r} was given to two operations"
            model.wrong("a version given twice", what, other, op)
    return found


def _find_origins(model: Model, chain: Chain, life: Life, there: set[int], certain: dict[int, Op], until: int) -> None:
    """Fills in how a life's versions can have come to be: those that are there, and `until` that it can have come."""
    unknown = [op for op in model.history.about(*chain.key, "step", *MAKING) if op.unknown]
    for version in range(life.first, until + 1):
        if (op := certain.get(version)) is not None:
            life.origins[version] = _ways(model, op, version)
            continue
        fitting = [op for op in unknown if _fits(model, chain, op, version) and (version > life.first or _makes(op))]
        fitting.sort(key=_makes)
        origins = [way for op in fitting for way in _ways(model, op, version)]
        if version not in there:
            life.origins[version] = [*origins, Origin(None)]
        elif origins:
            life.origins[version] = origins
        else:
            around = [one.op for one in chain.seen if abs(one.version - version) <= 1]
            rule = "a version that nobody made" if version > life.first else "an adapter that nobody made"
            model.wrong(rule, f"nobody made version {version} of {life}", *around[:6])
            return


def _makes(op: Op) -> bool:
    return op.kind in MAKING


def _fits(model: Model, chain: Chain, op: Op, version: int) -> bool:
    """Whether an operation of unknown outcome can have made a version, by when that and its neighbours were seen."""
    before = max((one.since for one in chain.seen if one.version < version), default=0.0)
    after = min((one.until for one in chain.seen if one.version >= version), default=math.inf)
    wanted = op.args.get("expected_version", version - 1) == version - 1
    return wanted and op.began <= after and model.history.end_of(op) >= before


def _ways(model: Model, op: Op, version: int) -> list[Origin]:
    if op.kind in MAKING:
        return [Origin(op)]
    return [Origin(op, tuple(passes)) for passes in _passes(model, op, version) if passes]  # none: it was refused


def _passes(model: Model, op: Op, version: int) -> Iterator[list[Op]]:
    """What a step can have taken in: passes that were answered, and some whose outcome nobody learned."""
    ok, epoch = op.ok, op.attempts[0].epoch  # a client does one thing at a time: its passes were before, and here
    counted: dict[int, Op] = {}
    unsure: list[Op] = []
    for one in model.history.about(op.tenant, op.name, "pass"):
        here = [attempt for attempt in one.attempts if attempt.epoch == epoch and attempt.began < op.began]
        if one.session != op.session or not here:
            continue
        done = next((attempt for attempt in here if attempt.code == OK), None)
        if done is not None and done.answer["version"] == version - 1:
            counted[done.answer["pending"]] = one
        elif done is None and any(attempt.code in AMBIGUOUS for attempt in here):
            unsure.append(one)
    applied = ok.answer["applied"] if ok is not None else None
    return _fill(counted, unsure[-_MOST_PASSES:], applied)


def _fill(counted: dict[int, Op], unsure: list[Op], applied: int | None) -> Iterator[list[Op]]:
    """Every way to have `applied` passes in order, where those at a known place are where they are."""
    totals = (
        [applied] if applied is not None else range(max(counted, default=0), max(counted, default=0) + len(unsure) + 1)
    )
    for total in totals:
        holes = [place for place in range(1, total + 1) if place not in counted]
        for chosen in combinations(unsure, len(holes)):
            order = {**{p: one for p, one in counted.items() if p <= total}, **dict(zip(holes, chosen, strict=True))}
            ops = [order[place] for place in sorted(order)]
            if all(a.began <= b.began for a, b in pairwise(ops)):
                yield ops


def _with_bases(model: Model, origin: Origin) -> Iterator[Origin]:
    """A copy, once for each version that it can have begun as, the newest first; what is no copy as it is."""
    op = origin.op
    if op is None or "init_from" not in op.args:
        yield origin
        return
    ended = op.ok.answer["created"] - model.history.clock + _SLACK if op.ok is not None else model.history.end_of(op)
    source = model.chains.get((op.tenant, op.args["init_from"]))
    if source is None:
        return
    for life in reversed(source.lives):
        for version in sorted(life.origins, reverse=True):
            asked = min((one.op.began for one in life.origins[version] if one.op is not None), default=math.inf)
            over = any(one.version > version and one.until < op.began for one in source.seen)
            if asked <= ended and not over:
                yield replace(origin, base=(source.key, version))
