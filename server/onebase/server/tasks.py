"""Requests under way on the worker's thread: what each has got, what it wants next, how it ends.

A task binds the adapter versions that it reads when it begins and gives them back when it ends, however it ends. It
resolves its job's future exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from onebase.server.errors import OnebaseError
from onebase.server.jobs import (
    DropGradientsJob,
    ForwardBackwardJob,
    Job,
    OptimStepJob,
    RowResult,
    ScoreJob,
    ScoreResult,
    Work,
)
from onebase.server.turns import Owner

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Weights
    from onebase.server.engine.engine import Engine
    from onebase.server.engine.training import Pass

J = TypeVar("J", bound=Job[Any])


class Task(Generic[J]):
    """A job under way."""

    def __init__(self, job: J) -> None:
        self.job = job
        self.begun = False
        self.ended = False

    @property
    def owner(self) -> Owner:
        """Whose turn it takes."""
        return Owner(self.job.tenant, self.job.session)

    @property
    def work(self) -> Work:
        """Its kind of work."""
        return self.job.work

    def begin(self, engine: Engine) -> None:
        """Binds what it reads of the engine, just before its first step."""
        del engine
        self.begun = True

    def release(self, engine: Engine) -> None:
        """Gives back to the engine what it bound."""

    def succeed(self, engine: Engine, result: object) -> None:
        """Ends with a result."""
        self._end(engine)
        if self._unanswered():
            self.job.done.set_result(result)

    def fail(self, engine: Engine, error: OnebaseError) -> None:
        """Ends with an error."""
        if not self.ended:
            self._end(engine)
            if self._unanswered():
                self.job.done.set_exception(error)

    def _unanswered(self) -> bool:
        """Whether somebody waits for an answer that has not come from elsewhere."""
        return not self.job.done.done() and self.job.done.set_running_or_notify_cancel()

    def _end(self, engine: Engine) -> None:
        self.ended = True
        self.release(engine)


class ScoreTask(Task[ScoreJob]):
    """Rows to score; a long job takes several steps and reads one version throughout."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.weights: dict[int, Weights | None] = {}
        self.results: list[RowResult | None] = [None] * len(job.rows)
        self._planned = 0
        self._missing = len(job.rows)

    def begin(self, engine: Engine) -> None:
        """Binds every adapter that the rows name."""
        super().begin(engine)
        for uid in {row.adapter for row in self.job.rows}:
            self.weights[uid] = engine.bind(uid, self.job.versions.get(uid))

    def release(self, engine: Engine) -> None:
        """Gives the versions back."""
        for weights in self.weights.values():
            engine.release(weights)

    def next_cost(self) -> int:
        """Tokens of the next row; 0 when all are planned."""
        return len(self.job.rows[self._planned].tokens) if self._planned < len(self.job.rows) else 0

    def take(self) -> int:
        """Plans the next row."""
        self._planned += 1
        return self._planned - 1

    def accept(self, engine: Engine, index: int, result: RowResult) -> None:
        """Keeps a row's numbers; the last one ends the task."""
        self.results[index] = result
        self._missing -= 1
        if not self._missing:
            versions = {uid: 0 if weights is None else weights.version for uid, weights in self.weights.items()}
            self.succeed(engine, ScoreResult(tuple(r for r in self.results if r is not None), versions))


class PassTask(Task[ForwardBackwardJob]):
    """A forward and backward pass, in as many steps as its rows need.

    Where it is cut into micro-batches depends on the job alone, whoever shares its steps: so do its sums.
    """

    def __init__(self, job: ForwardBackwardJob, train_tokens: int) -> None:
        super().__init__(job)
        self.adapter = job.adapter
        self.state: Pass | None = None
        self._batches = micro_batches([len(row.tokens) for row in job.rows], train_tokens, job.rows_per_term)
        self._batches.reverse()

    def begin(self, engine: Engine) -> None:
        """Checks that the adapter can be trained as asked."""
        super().begin(engine)
        self.state = engine.begin_pass(self.job)

    def next_cost(self) -> int:
        """Tokens of the next micro-batch; 0 when all are run."""
        return self._batches[-1][1] if self._batches else 0

    def next_rows(self) -> int:
        """How many rows the next micro-batch has."""
        return self._batches[-1][0]

    def ran(self) -> None:
        """The next micro-batch was run."""
        self._batches.pop()

    def halve(self) -> bool:
        """Cuts what is left into micro-batches half as large as the next one; whether that was possible."""
        rows, cost = self._batches[-1]
        if rows <= self.job.rows_per_term:
            return False
        left = sum(count for count, _ in self._batches)
        costs = [len(row.tokens) for row in self.job.rows[len(self.job.rows) - left :]]
        self._batches = micro_batches(costs, cost // 2, self.job.rows_per_term)[::-1]
        return True


class StepTask(Task[OptimStepJob | DropGradientsJob]):
    """What ends a round of passes: an optimizer step, or dropping the gradients."""

    def __init__(self, job: OptimStepJob | DropGradientsJob) -> None:
        super().__init__(job)
        self.adapter = job.adapter

    def next_cost(self) -> int:
        """None: a step has no rows."""
        return 0


def micro_batches(costs: Sequence[int], most: int, together: int = 1) -> list[tuple[int, int]]:
    """Cuts rows, in their order, into (rows, tokens) of at most so many tokens; a longer row stands alone.

    Only between groups of `together` rows is there a cut, so a longer group stands alone too.
    """
    found: list[tuple[int, int]] = []
    for first in range(0, len(costs), together):
        group = costs[first : first + together]
        cost = sum(group)
        if found and found[-1][1] + cost <= most:
            found[-1] = (found[-1][0] + len(group), found[-1][1] + cost)
        else:
            found.append((len(group), cost))
    return found
