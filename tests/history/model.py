"""What a history says there was: adapters, each from one making to one end, with every version and who made it.

A name may mean several adapters one after the other (deleted and made again, or replaced); the time of its making,
which the server reports, tells them apart. Operations whose outcome nobody learned may have made an adapter, a
version, an end, or nothing: each is believed where something that was seen needs it, and only there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

from history.journal import AMBIGUOUS, MAKING, OK, Attempt, History, Op

OPERATORS = frozenset({"reward"})
"""Adapters that everybody may read."""
_SLACK = 0.05
"""Seconds by which two clocks may differ."""
_MOST_PASSES = 6
"""Of so many passes whose outcome nobody learned, each subset is tried."""


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


@dataclass(eq=False)
class Step:
    """How a version came to be: a step, and what it may have taken in."""

    op: Op
    options: list[list[Op]]
    """Passes, in order; the first option that explains what was seen is believed."""


@dataclass(eq=False)
class Life:
    """One adapter, from its making to its end."""

    tenant: str
    name: str
    created: float
    maker: Op | None
    first: int
    """Its version when it was made."""
    seen: list[tuple[Op, Attempt, int]] = field(default_factory=list)
    """Answers about this one for certain, with the version."""
    steps: dict[int, Step] = field(default_factory=dict)
    reads: list[tuple[Op, Attempt, int]] = field(default_factory=list)
    """Answers with numbers that may be about this one."""
    known: float = math.inf
    """From then on it was there, for certain."""
    dead: float = math.inf
    """From then on it was not, for certain."""

    @property
    def last(self) -> int:
        """The highest version that was seen of it, for certain."""
        return max([self.first, *self.steps, *(version for _, _, version in self.seen)])

    def __str__(self) -> str:
        return f"{self.tenant}'s {self.name} of {self.created:.3f}"


@dataclass
class Model:
    """The lives of all adapters, and what speaks against them."""

    history: History
    lives: dict[tuple[str, str], list[Life]]
    violations: list[Violation]

    def all(self) -> Iterator[Life]:
        """Every life, the oldest first."""
        yield from sorted((one for lives in self.lives.values() for one in lives), key=lambda one: one.created)


def answered(ops: Iterable[Op]) -> Iterator[tuple[Op, Attempt]]:
    """Every attempt that was answered with a result."""
    for op in ops:
        for attempt in op.attempts:
            if attempt.code == OK and attempt.ended is not None:
                yield op, attempt


def build(history: History) -> Model:
    """Finds the adapters that there were, and how their versions came to be."""
    model = Model(history, {}, [])
    _find_lives(model)
    _find_ends(model)
    _find_steps(model)
    _spread_reads(model)
    return model


# ------------------------------------------------------------------------------------------------------------ lives


def _find_lives(model: Model) -> None:
    lives: dict[tuple[str, str], dict[float, Life]] = defaultdict(dict)
    for op in model.history.ops:
        if op.kind in MAKING and (ok := op.ok) is not None:
            life = Life(op.tenant, op.name, ok.answer["created"], op, ok.answer["version"])
            life.known = ok.ended or math.inf
            lives[op.tenant, op.name][life.created] = life
    for op, attempt, name, created, version in _sightings(model.history):
        there = lives[op.tenant, name]
        if created not in there:
            maker = _maker(model.history, op.tenant, name, created, set(_makers(there.values())))
            if maker is None:
                what = f"{op.tenant} sees {name!r} made at {created:.3f}, and nobody of {op.tenant} made it"
                model.violations.append(Violation("an adapter that nobody made", what, (op,)))
            there[created] = Life(op.tenant, name, created, maker, version)
        life = there[created]
        life.seen.append((op, attempt, version))
        if life.maker is None or life.maker.ok is None:
            life.first = min(life.first, version)
        life.known = min(life.known, attempt.ended or math.inf)
    model.lives = {key: [found[at] for at in sorted(found)] for key, found in lives.items()}


def _makers(lives: Iterable[Life]) -> Iterator[str]:
    return (life.maker.id for life in lives if life.maker is not None)


def _sightings(history: History) -> Iterator[tuple[Op, Attempt, str, float, int]]:
    """Answers that say when an adapter was made, in the order in which they came."""
    for op, attempt in sorted(answered(history.ops), key=lambda one: one[1].ended or 0.0):
        if op.kind == "list":
            for name, created, version in attempt.answer["adapters"]:
                if name not in OPERATORS:
                    yield op, attempt, name, created, version
        elif op.kind == "get" and op.name not in OPERATORS:
            yield op, attempt, op.name, attempt.answer["created"], attempt.answer["version"]


def _maker(history: History, tenant: str, name: str, created: float, taken: set[str]) -> Op | None:
    """The operation of unknown outcome that made an adapter just then, if there is one."""
    at = created - history.clock
    for op in history.about(tenant, name, *MAKING):
        if op.unknown and op.id not in taken and op.began - _SLACK <= at <= history.end_of(op) + _SLACK:
            return op
    return None


def _find_ends(model: Model) -> None:
    for (tenant, name), lives in model.lives.items():
        deletes = model.history.about(tenant, name, "delete")
        for life, later in zip(lives, [*lives[1:], None], strict=True):
            if later is not None:
                life.dead = later.known
            for op in deletes:
                if (ok := op.ok) is not None and life.known < op.attempts[0].began:
                    life.dead = min(life.dead, ok.ended or math.inf)


# ------------------------------------------------------------------------------------------------------------ versions


def candidates(model: Model, tenant: str, name: str, attempt: Attempt, version: int) -> list[Life]:
    """The lives that an answer about a version may be about."""
    found = []
    for life in model.lives.get((tenant, name), ()):
        if (
            life_began(model, life) <= (attempt.ended or math.inf)
            and attempt.began <= life.dead
            and version >= life.first
        ):
            found.append(life)
    # A replaced adapter's versions go on in its successor: the newest that has begun so low is meant.
    return [one for one in found if not any(o.created > one.created and o.known < attempt.began for o in found)]


def _find_steps(model: Model) -> None:
    makers: dict[tuple[str, float, int], list[Op]] = defaultdict(list)
    steps = [(op, op.ok) for op in model.history.ops if op.kind == "step" and op.ok is not None]
    for op, ok in sorted(steps, key=lambda one: one[0].may_be_kept(one[1])):  # what is certain goes first
        version = ok.answer["version"]
        there = candidates(model, op.tenant, op.name, Attempt(0, op.began, ok.ended), version)
        there = [life for life in there if version > life.first]
        if op.may_be_kept(ok):  # it may be of an adapter before: of the one that had come so far, and no further
            there = [one for one in there if _came_to(one) >= version - 1 and version not in one.steps] or there
        if not there:
            what = f"a step made version {version} of {op.name!r}, which was not there"
            model.violations.append(Violation("a step on nothing", what, (op,)))
            continue
        life = there[-1]
        makers[str(life), life.created, version].append(op)
        life.seen.append((op, replace(ok, began=op.began), version))
        life.steps.setdefault(version, Step(op, _options(model, life, op, version)))
    for (_, _, version), ops in makers.items():
        if len(ops) > 1:
            what = f"version {version} of {ops[0].name!r} was given {len(ops)} times"
            model.violations.append(Violation("a version given twice", what, tuple(ops)))
    for life in model.all():
        there = model.history.about(life.tenant, life.name, "step")
        _believe_unknown_steps(model, life, [op for op in there if op.unknown])


def _came_to(life: Life) -> int:
    """The highest version that was seen so far."""
    return max([life.first, *life.steps, *(version for _, _, version in life.seen)])


def _believe_unknown_steps(model: Model, life: Life, unknown: list[Op]) -> None:
    """Versions that were seen, and that no answered step made."""
    highest = max([life.last, *(v for _, _, v in _certain_reads(model, life))])
    for version in range(life.first + 1, highest + 1):
        if version in life.steps:
            continue
        fitting = [
            op
            for op in unknown
            if op.began < life.dead
            and model.history.end_of(op) > life_began(model, life)
            and op.id not in {step.op.id for step in life.steps.values()}
            and _between(model, life, op, version)
        ]
        if not fitting:
            around = [op for op, _, v in life.seen if abs(v - version) <= 1]
            what = f"nobody made version {version} of {life}"
            model.violations.append(Violation("a version that nobody made", what, tuple(around[:6])))
            return
        life.steps[version] = Step(fitting[0], _options(model, life, fitting[0], version))


def _between(model: Model, life: Life, op: Op, version: int) -> bool:
    """Whether an unknown step can have come after the version before this one, and before the one after."""
    seen = [*life.seen, *_certain_reads(model, life)]
    before = [attempt.began for _, attempt, v in seen if v < version]
    after = [attempt.ended for _, attempt, v in seen if v >= version and attempt.ended is not None]
    wanted = op.args.get("expected_version", version - 1)
    return (
        wanted == version - 1
        and op.began <= min(after, default=math.inf)
        and (model.history.end_of(op) >= max(before, default=0.0))
    )


def _certain_reads(model: Model, life: Life) -> Iterator[tuple[Op, Attempt, int]]:
    for op, attempt in answered(model.history.about(life.tenant, life.name)):
        version = attempt.answer.get("version")
        if version is not None and op.kind not in ("save", "step", *MAKING):  # those may be answers of long ago
            if candidates(model, op.tenant, op.name, attempt, version) != [life]:
                continue
            yield op, attempt, version


def _options(model: Model, life: Life, op: Op, version: int) -> list[list[Op]]:
    """Which passes a step can have taken in: those that were answered, and some whose outcome nobody learned."""
    ok, epoch = op.ok, op.attempts[0].epoch  # a client does one thing at a time: its passes were before, and here
    counted: dict[int, Op] = {}
    unsure: list[Op] = []
    for one in model.history.about(op.tenant, op.name, "pass"):
        here = [attempt for attempt in one.attempts if attempt.epoch == epoch and attempt.began < op.began]
        if one.session != op.session or not here:
            continue
        done = next((attempt for attempt in here if attempt.code == OK), None)
        if done is not None and done.answer["version"] == version - 1 and done.began >= life_began(model, life):
            counted[done.answer["pending"]] = one
        elif done is None and any(attempt.code in AMBIGUOUS for attempt in here):
            unsure.append(one)
    applied = ok.answer["applied"] if ok is not None else None
    return list(_fill(counted, unsure[-_MOST_PASSES:], applied))


def life_began(model: Model, life: Life) -> float:
    """Before that it was not: the server's own word of when it made it."""
    return life.created - model.history.clock - _SLACK


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


def _spread_reads(model: Model) -> None:
    """Gives every answer with numbers to the lives that it may be about."""
    for op, attempt in answered(model.history.ops):
        answer: dict[str, Any] = attempt.answer
        if op.kind in ("reward", "save", "list", "get") or "version" not in answer or not op.name:
            continue
        there = candidates(model, op.tenant, op.name, attempt, answer["version"])
        if op.kind in MAKING or op.kind == "step":
            continue
        if not there:
            what = f"numbers of version {answer['version']} of {op.tenant}'s {op.name!r}, which was not there"
            model.violations.append(Violation("numbers of nothing", what, (op,)))
        for life in there:
            life.reads.append((op, attempt, answer["version"]))
            if len(there) == 1:
                life.seen.append((op, attempt, answer["version"]))
