"""What must hold of every history, whatever the timing was. Numbers are `replay`'s to check."""

from __future__ import annotations

import math
from collections.abc import Iterator

from history import gradients, leases, refusals
from history.journal import AMBIGUOUS, DURABLE, LAST_LOOK, MAKING, OK, Attempt, Op
from history.model import Chain, Model, Seen, Violation, answered, times_of_making


def check(model: Model) -> list[Violation]:
    """All that is wrong."""
    return [
        *model.violations,
        *_existence(model),
        *_lists(model),
        *_last_look(model),
        *_order(model),
        *_once(model),
        *leases.leases(model),
        *leases.sessions(model),
        *_tenants(model),
        *gradients.check(model),
        *refusals.check(model),
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
        for op in model.history.about(*chain.key):
            yield from _there(model, chain, op)


def _there(model: Model, chain: Chain, op: Op) -> Iterator[Violation]:
    """What is there is found, and nothing else gets its name."""
    for attempt in op.attempts:
        denied = attempt.reason == "ADAPTER_NOT_FOUND" and "init_from" not in op.args
        taken = op.kind in MAKING and not op.args.get("replace") and attempt is op.ok
        if not denied and not taken:
            continue
        there = certain(model, chain, attempt, op.began if taken else attempt.began)
        if there is not None and denied:
            what = f"{chain.key[1]!r} was there for certain, and {op.tenant} was told that it is not"
            yield Violation("an adapter that disappeared", what, (there.op, op))
        elif there is not None:
            what = f"{chain.key[0]} has made {chain.key[1]!r}, which was there for certain"
            yield Violation("a name that was taken", what, (there.op, op))


def certain(model: Model, chain: Chain, attempt: Attempt, began: float | None = None) -> Seen | None:
    """The answer which says that an adapter was there for certain while a call was made; None: it may have gone.

    Args:
        model: all that is known.
        chain: of the adapter.
        attempt: the call.
        began: when its operation was first sent, where the answer may be one that was kept.
    """
    began = attempt.began if began is None else began
    there = max((one for one in chain.seen if one.until < began), key=lambda one: one.since, default=None)
    if there is None or attempt.ended is None:
        return None
    return None if model.history.between(there.since, attempt.ended, *chain.key, "delete") else there


def _lists(model: Model) -> Iterator[Violation]:
    """A list leaves nothing out."""
    for op, attempt in answered(model.history.ops):
        if "adapters" not in attempt.answer:
            continue
        listed = {name for name, _, _ in attempt.answer["adapters"]}
        for chain in model.chains.values():
            tenant, name = chain.key
            if tenant == op.tenant and name not in listed and (there := certain(model, chain, attempt)) is not None:
                what = f"{name!r} was there for certain, and the list that {tenant} got leaves it out"
                yield Violation("an adapter that no list shows", what, (there.op, op))


def _last_look(model: Model) -> Iterator[Violation]:
    """When all is over nobody disturbs the server any more: it says of every name what it is, or that it is not."""
    for op in model.history.ops:
        last = op.attempts[-1]
        if op.client >= LAST_LOOK and last.code != OK and last.reason != "ADAPTER_NOT_FOUND":
            yield Violation("a last look that failed", f"{op.kind} {op.name!r}: {last.code} {last.reason}", (op,))


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
