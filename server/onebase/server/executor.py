"""One engine step, from a plan to answers. Whatever a job does wrong ends that job alone (see `isolation`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase.server.completions import Completion, GenerateTask, Prefill
from onebase.server.config import Limits
from onebase.server.engine import Engine, training
from onebase.server.engine.batch import Row
from onebase.server.engine.engine import Decoding, Draw, Scoring
from onebase.server.isolation import AnyTask, Isolation, told
from onebase.server.jobs import (
    ClientStateJob,
    CreateAdapterJob,
    DeleteAdapterJob,
    DescribeAdaptersJob,
    DropGradientsJob,
    Job,
    LoadAdapterJob,
    OptimStepResult,
    SaveAdapterJob,
    SaveResult,
)
from onebase.server.meter import Meter
from onebase.server.scheduler import Plan
from onebase.server.tasks import PassTask, ScoreTask, StepTask

Scored = tuple[ScoreTask, int]


def _as_it_is(result: Any) -> object:
    return result


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Aside:
    """The part of a job for which no engine step should wait: files are read or written on another thread."""

    work: Callable[[], Any]
    """Runs on that thread."""
    accept: Callable[[Any], object] = _as_it_is
    """Makes the job's result of what `work` returned, on the worker's thread."""
    release: Callable[[], None] = _nothing
    """Gives back what `work` read, on the worker's thread, however it ended."""


class Executor:
    """Runs plans on the engine.

    Args:
        engine: the device.
        limits: the largest rank to load.
        begin_aside: has another thread do its part of a job, and resolves the job then.
    """

    def __init__(self, engine: Engine, limits: Limits, begin_aside: Callable[[Job[Any], Aside], None]) -> None:
        self._engine = engine
        self._limits = limits
        self._begin_aside = begin_aside
        self._isolation = Isolation(engine)
        self._snapshots = itertools.count()
        self.generated, self.scored, self.trained = Meter(), Meter(), Meter()

    @property
    def too_many(self) -> int:
        """Tokens of the last step, if memory was too short for all of them together; 0 otherwise."""
        return self._isolation.too_many

    # ----------------------------------------------------------------------------------------------- inference

    def infer(self, plan: Plan, running: Sequence[Completion]) -> None:
        """Rows to score, prompts to begin and completions to go on with, in one batch."""
        prompts = [task for task in plan.prompts if isinstance(task, GenerateTask)]
        scores = [(task, index) for task, index in plan.scores if isinstance(task, ScoreTask)]
        for task in prompts:
            self._begin(task)
        for scored, _ in scores:
            self._begin(scored)
        parts: list[tuple[AnyTask, Scored | Completion | Prefill]]
        parts = [(task, (task, index)) for task, index in scores if not task.ended]
        parts += [(completion.task, completion) for completion in self._make_room(running)]
        for task in prompts:
            if not task.ended:
                self._isolation.attempt(task, task.take, self._engine)
        parts += [(task, prompt) for task in prompts if not task.ended for prompt in task.filling]
        self._isolation.run(parts, self._infer_step)

    def _make_room(self, running: Sequence[Completion]) -> list[Completion]:
        """The completions that go on; the youngest ones give up their slots while the cache's budget is too small."""
        kept = list(running)
        while kept and not self._engine.kv.fits(max(completion.length for completion in kept)):
            youngest = kept.pop()
            youngest.task.preempt(self._engine, youngest)
        return kept

    def _infer_step(self, parts: Sequence[Scored | Completion | Prefill]) -> None:
        engine = self._engine
        scores = [part for part in parts if isinstance(part, tuple)]
        groups = [part for part in parts if not isinstance(part, tuple)]
        scorings = [Scoring(row := task.job.rows[index], task.weights[row.adapter]) for task, index in scores]
        decodings = [self._decoding(group) for group in groups]
        results, drawn = engine.step(scorings, decodings)
        for part in groups:
            if isinstance(part, Prefill):
                part.completions[0].task.share(engine, part)
        # From here on numbers are kept, and nothing may fail any more but a task by itself.
        prefilled = sum(part.stop - part.done for part in groups if isinstance(part, Prefill))
        self.scored.add(prefilled + sum(len(s.row.tokens) for s in scorings))
        self.generated.add(sum(len(d.draws) for d in decodings))
        for part in groups:
            if isinstance(part, Prefill):
                part.completions[0].task.filled(engine, part)
        for (task, index), result in zip(scores, results, strict=True):
            self._isolation.attempt(task, task.accept, engine, index, result)
        for part, tokens in zip(groups, drawn, strict=True):
            completions = part.completions if isinstance(part, Prefill) else [part]
            for completion, one in zip(completions, tokens, strict=False):  # no token before a prompt's end
                if not completion.task.ended:
                    self._isolation.attempt(completion.task, completion.task.accept, engine, completion, one)

    def _decoding(self, part: Completion | Prefill) -> Decoding:
        eos = self._engine.facts.eos_token_ids
        if isinstance(part, Completion):
            first, drawing = part, [part]
            row = Row(part.task.weights, part.tokens[-1:], part.length - 1, part.slot)
        else:
            first, drawing = part.completions[0], part.completions if part.whole else []
            row = Row(first.task.weights, part.tokens[part.done : part.stop], part.done, first.slot)
        job = first.task.job
        draws = tuple(Draw(job.sampling, completion.place, completion.banned(eos)) for completion in drawing)
        return Decoding(row, draws, value=job.return_values)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, plan: Plan) -> None:
        """Optimizer steps, then rows of one or several passes in one batch."""
        for task in plan.steps:
            if isinstance(task, StepTask):
                self._isolation.run([(task, task)], self._end_rounds)
        passes = [task for task in plan.trains if isinstance(task, PassTask)]
        for task in passes:
            self._begin(task)
        self._isolation.run([(task, task) for task in passes], self._train_step)
        for task in passes:
            if not task.ended and not task.next_cost():
                self._isolation.attempt(task, self._finish_pass, task)

    def _train_step(self, tasks: Sequence[PassTask]) -> None:
        training.run(self._engine, [(task.state, task.next_rows()) for task in tasks if task.state is not None])
        self.trained.add(sum(task.next_cost() for task in tasks))
        for task in tasks:
            task.ran()

    def _finish_pass(self, task: PassTask) -> None:
        if task.state is not None:
            task.succeed(self._engine, training.finish(task.state))

    def _end_rounds(self, tasks: Sequence[StepTask]) -> None:
        for task in tasks:
            self._end_round(task)

    def _end_round(self, task: StepTask) -> None:
        task.begin(self._engine)
        adapter, job = self._engine.adapter(task.adapter), task.job
        if isinstance(job, DropGradientsJob):
            adapter.drop_gradients()
            task.succeed(self._engine, adapter.facts())
            return
        adapter.check_version(job.expected_version)
        adapter.check_pending(job.expected_pending)
        norm, applied = adapter.step(job.adamw, job.max_grad_norm)
        adapter.leave(job.client_state)
        saved = None if job.save_to is None else self._save_step(task.adapter, job.save_to)
        task.succeed(self._engine, OptimStepResult(adapter.weights.version, norm, applied, adapter.facts(), saved))

    def _save_step(self, uid: int, path: Path) -> Future[SaveResult]:
        """Begins to write the version that a step has just made, before any other step can be made.

        The step is made: what fails here fails its saving alone, which can be asked for again.
        """
        job = SaveAdapterJob(adapter=uid, path=path, with_optimizer=True, with_client_state=True)
        try:
            self._begin_aside(job, self._save(job))
        except Exception as error:
            job.done.set_exception(told(error))
        return job.done

    def _begin(self, task: AnyTask) -> None:
        if not task.begun and not task.ended:
            self._isolation.attempt(task, task.begin, self._engine)

    # --------------------------------------------------------------------------------------------------- admin

    def admin(self, job: Job[Any]) -> object:
        """Makes, loads, saves, deletes or describes adapters: the job's result, or what another thread does for it.

        Raises:
            OnebaseError: what the job did wrong.
        """
        engine = self._engine
        if isinstance(job, CreateAdapterJob):
            if job.init_from is not None:
                return engine.add(engine.formats.copy(job, engine.adapter(job.init_from)))
            return Aside(lambda: engine.formats.create(job), engine.add)
        if isinstance(job, LoadAdapterJob):
            return Aside(lambda: engine.formats.load(job, self._limits.max_rank), engine.add)
        if isinstance(job, SaveAdapterJob):
            return self._save(job)
        if isinstance(job, DeleteAdapterJob):
            engine.delete(job.adapter)
            return None
        if isinstance(job, ClientStateJob):
            return engine.adapter(job.adapter).client_state
        if isinstance(job, DescribeAdaptersJob):
            return engine.all_facts()
        raise TypeError(f"a job of an unknown kind, {type(job).__name__}")

    def _save(self, job: SaveAdapterJob) -> Aside:
        engine, number = self._engine, next(self._snapshots)
        engine.adapter(job.adapter).leave(job.client_state)
        adapter = engine.snapshot(
            job.adapter, with_optimizer=job.with_optimizer, with_client_state=job.with_client_state
        )

        def write() -> SaveResult:
            if job.merged:
                return engine.merger.save(adapter, job.path, overwrite=job.overwrite, stamp=job.stamp)
            saved = engine.formats.save(
                adapter, job.path, with_optimizer=job.with_optimizer, overwrite=job.overwrite, stamp=job.stamp
            )
            return replace(saved, snapshot=number)

        return Aside(write, release=lambda: engine.release(adapter.weights))
