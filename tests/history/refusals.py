"""Refusals: each needs a cause, and a server that refuses everything keeps its promises to nobody.

What may have caused a refusal is looked for among all that may have happened meanwhile, operations of unknown outcome
and refused ones among it. So what is named here can have had no cause at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import takewhile

from history.journal import LAST_LOOK, MAKING, OK, Attempt, Op
from history.leases import Calls, calls_of, held_on
from history.model import Model, Violation

_NEVER = frozenset(
    {"INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "DATA_LOSS"}
)
"""What clients send here is well formed and theirs to ask, and no file is damaged."""
_BROKEN = frozenset({"INTERNAL", "UNKNOWN"})
_TOLD_LATE = 0.5
"""Seconds by which the end of a server may be written down after its clients have seen it."""
_TAKES_LEASE = frozenset({"pass", "step", "active", *MAKING})
_FLOOR, _ENOUGH = 0.3, 100
"""The share of all operations that must be answered, and how many there must be before that is asked. In a run of 200
kills half of them are: the rest is refused because others hold a lease or a name, or meets the end of a server."""


def check(model: Model) -> Iterator[Violation]:
    """All refusals that had no cause."""
    calls = calls_of(model)
    for op in model.history.ops:
        for attempt in op.attempts:
            yield from _undeclared(model, op, attempt)
            if attempt.ended is None:
                continue
            if attempt.reason in ("NOT_LEASE_HOLDER", "ADAPTER_LEASED"):
                yield from _leased(model, calls, op, attempt)
            elif attempt.reason == "VERSION_MISMATCH":
                yield from _mismatched(model, op, attempt)
            elif attempt.reason == "ADAPTER_EXISTS" and not _may_be_there(model, op, attempt):
                yield Violation("a refusal without a cause", f"there was no {op.name!r} for certain", (op,))
            elif attempt.reason == "ADAPTER_BUSY" and not _others(model, op, attempt, "delete", *MAKING):
                yield Violation("a refusal without a cause", f"nobody was replacing or deleting {op.name!r}", (op,))
    yield from _floor(model)


def _undeclared(model: Model, op: Op, attempt: Attempt) -> Iterator[Violation]:
    """Errors that nothing here can have caused: nothing was damaged, nothing is malformed, and a bug is a bug.

    One is let pass: INTERNAL or UNKNOWN that the server itself did not give (it has no reason), of a call that was
    under way when its server ended. The client's gRPC makes that up where it loses the connection in the middle of an
    answer: a stream that is reset, or ends without its status, has one of these codes by gRPC's own table, and
    UNAVAILABLE only where the connection is seen to break first.
    """
    epoch = model.history.epochs.get(attempt.epoch)
    until = attempt.ended if attempt.ended is not None else attempt.began
    broken = epoch is not None and attempt.began <= epoch.ended <= until + _TOLD_LATE
    if attempt.code in _NEVER or (attempt.code in _BROKEN and (attempt.reason or not broken)):
        yield Violation("an answer that no page declares", f"{attempt.code} {attempt.reason}".strip(), (op,))


def _leased(model: Model, calls: Calls, op: Op, attempt: Attempt) -> Iterator[Violation]:
    """Who holds a lease for certain is not told that another does.

    Only a call's first attempt shows a lease: a later one may get an answer that was kept, and the adapter that it made
    may have come back after a kill without the lease.
    """
    key = op.tenant, op.name
    shown = [
        (one, first)
        for one, first in takewhile(lambda call: call[1].began < attempt.began, calls.get(op.session, ()))
        if one.kind in _TAKES_LEASE and one.name == op.name and first.code == OK and first is one.attempts[0]
    ]
    if not shown:
        return
    one, first = shown[-1]
    freed = model.history.between(one.began, attempt.ended or 0.0, *key, "delete")
    if not freed and held_on(model, calls, one, first, attempt):
        what = f"session {op.session[:6]} held the lease of {op.name!r} for certain, and was told {attempt.reason}"
        yield Violation("a refusal without a cause", what, (one, op))


def _mismatched(model: Model, op: Op, attempt: Attempt) -> Iterator[Violation]:
    """A version differs from what was expected only where somebody may have made another."""
    key, ended = (op.tenant, op.name), attempt.ended or 0.0
    if op.kind in MAKING and op.args.get("replace"):  # it was stepped while it was to be replaced
        if not model.history.between(attempt.began, ended, *key, "step"):
            yield Violation("a refusal without a cause", f"nobody stepped {op.name!r} meanwhile", (op,))
        return
    wanted = op.args.get("expected_version")
    if wanted is None:
        yield Violation("a refusal without a cause", f"{op.kind} expects no version: {attempt.reason}", (op,))
        return
    seen = model.chains[key].seen if key in model.chains else []
    for one in seen:
        if one.version != wanted or one.until >= attempt.began or one.op is op:
            continue
        since = model.history.between(one.since, ended, *key, "step", "delete", *MAKING)
        if all(other is op or other is one.op for other in since):
            what = f"{op.name!r} was at version {wanted} for certain, as {op.kind} expected"
            yield Violation("a refusal without a cause", what, (one.op, op))
            return


def _may_be_there(model: Model, op: Op, attempt: Attempt) -> bool:
    """Whether a name can have been taken: somebody had made it, or was about to, and nobody had deleted it since."""
    if _others(model, op, attempt, *MAKING):
        return True
    key = op.tenant, op.name
    deletes = [(one.began, one.ok.ended or 0.0) for one in model.history.about(*key, "delete") if one.ok is not None]
    for maker in model.history.about(*key, *MAKING):
        if maker is op or not maker.possible or maker.began > attempt.began:
            continue
        made = model.history.end_of(maker)
        if not any(made <= began and ended <= attempt.began for began, ended in deletes):
            return True
    return False


def _others(model: Model, op: Op, attempt: Attempt, *kinds: str) -> bool:
    """Whether other operations of these kinds may have been under way meanwhile; they keep a name also in vain."""
    for one in model.history.about(op.tenant, op.name, *kinds):
        until = model.history.end_of(one) if one.possible else one.attempts[-1].ended or 0.0
        if one is not op and one.began < (attempt.ended or 0.0) and until > attempt.began:
            return True
    return False


def _floor(model: Model) -> Iterator[Violation]:
    """Enough was answered, and something of every kind to each tenant: else there was nothing to check."""
    sent: Counter[tuple[str, str]] = Counter()
    done: Counter[tuple[str, str]] = Counter()
    for op in model.history.ops:
        if op.kind != "reuse" and op.client < LAST_LOOK:  # the one shall be refused, and the other is another rule's
            sent[op.tenant, op.kind] += 1
            done[op.tenant, op.kind] += op.ok is not None
    if sent.total() >= _ENOUGH and done.total() < _FLOOR * sent.total():
        what = f"{done.total()} of {sent.total()} operations were answered"
        yield Violation("a server that refuses too much", what)
    for (tenant, kind), count in sent.items():
        if count >= _ENOUGH and not done[tenant, kind]:
            yield Violation("a server that refuses too much", f"none of {count} {kind} of {tenant} was answered")
