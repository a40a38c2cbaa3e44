"""What becomes of passes that were answered, and whether calls were let in that expected something else.

A pass's gradients wait until a step takes them. They go with the server that has them, and with the lease of the
session that made them; so of what one session does in one life of the server none may be missing. Which version an
answer tells says by itself whether another adapter, or a step, lies between: none is given twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from history.journal import MAKING, Attempt, Op
from history.model import Key, Model, Violation, answered


@dataclass(frozen=True)
class Waiting:
    """What was answered to a pass: so many passes waited then, under that version."""

    op: Op
    attempt: Attempt

    @property
    def pending(self) -> int:
        """How many."""
        return int(self.attempt.answer["pending"])

    @property
    def version(self) -> int:
        """Under which version."""
        return int(self.attempt.answer["version"])

    def before(self, op: Op) -> bool:
        """Whether another operation was begun when this was answered."""
        return op is not self.op and self.attempt.ended is not None and self.attempt.ended < op.began


def check(model: Model) -> Iterator[Violation]:
    """All that is wrong with passes and steps."""
    for key in model.chains:
        # By session and life of the server: who is answered twice in one life has lived all the time, and so has its
        # lease. A repeated call of an earlier life began before all of these.
        waiting: dict[tuple[str, int], list[Waiting]] = defaultdict(list)
        for op, attempt in answered(model.history.about(*key, "pass")):
            waiting[op.session, attempt.epoch].append(Waiting(op, attempt))
        for op in model.history.about(*key, "pass", "step"):
            for attempt in op.attempts:
                before = [one for one in waiting[op.session, attempt.epoch] if one.before(op)]
                yield from _kept(op, attempt, before)
                yield from _refused(model, key, op, attempt, before)
        for op, attempt in answered(model.history.about(*key, "pass", "step")):
            yield from _fenced(op, attempt)


def _kept(op: Op, attempt: Attempt, before: list[Waiting]) -> Iterator[Violation]:
    """A step takes in every pass that was answered under the version before it, and a pass is counted on from them."""
    if not attempt.answer:
        return
    version = attempt.answer["version"] - (op.kind == "step")
    most = max((one for one in before if one.version == version), key=lambda one: one.pending, default=None)
    count = attempt.answer["applied"] if op.kind == "step" else attempt.answer["pending"] - 1
    if most is not None and count < most.pending:
        what = f"{most.pending} passes waited under version {version}, and there were {count} for the next {op.kind}"
        yield Violation("a pass that was lost", what, (most.op, op))


def _refused(model: Model, key: Key, op: Op, attempt: Attempt, before: list[Waiting]) -> Iterator[Violation]:
    """No call is told that gradients are missing which wait for certain."""
    if attempt.reason not in ("NO_GRADIENTS", "GRADIENTS_LOST") or attempt.ended is None:
        return
    for one in before:
        taken = model.history.between(one.op.began, attempt.ended, *key, "step", "delete", *MAKING)
        wanted = 1 if attempt.reason == "NO_GRADIENTS" else op.args.get("expected_pending", 0)
        if wanted <= one.pending and all(other is op for other in taken):
            what = f"{one.pending} passes waited for certain, and the next {op.kind} was told {attempt.reason}"
            yield Violation("a pass that was lost", what, (one.op, op))
            return
    if attempt.reason == "GRADIENTS_LOST" and not op.args.get("expected_pending"):
        yield Violation("a refusal without a cause", f"{op.kind} expects no gradients: {attempt.reason}", (op,))


def _fenced(op: Op, attempt: Attempt) -> Iterator[Violation]:
    """What a call expected was so: that version, and so many passes or more."""
    version = attempt.answer["version"] - (op.kind == "step")
    count = attempt.answer["applied"] if op.kind == "step" else attempt.answer["pending"] - 1
    if op.args.get("expected_version", version) != version:
        what = f"{op.kind} expected version {op.args['expected_version']}, and was made at {version}"
        yield Violation("a fence that did not hold", what, (op,))
    if op.args.get("expected_pending", 0) > count:
        what = f"{op.kind} expected {op.args['expected_pending']} passes, and {count} waited"
        yield Violation("a fence that did not hold", what, (op,))
