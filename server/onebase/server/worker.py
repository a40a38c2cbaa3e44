"""The worker: the one thread that owns the device. It takes jobs in, asks the scheduler, runs steps, resolves futures.

loop:  take in new jobs  →  drop what was cancelled or is too late  →  plan  →  one engine step  →  answer

Files are read and written on threads beside it, so that no step waits for a disk: what they read of the device does not
change, and what they make is taken in between two steps.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from onebase.server.config import CPU_BUDGET, Budget, Limits
from onebase.server.engine import Engine
from onebase.server.errors import Cancelled, OnebaseError, ResourceExhausted, Unavailable
from onebase.server.executor import AnyTask, Aside, Executor, told
from onebase.server.jobs import (
    BaseFacts,
    DropGradientsJob,
    EvictAdapterJob,
    ForwardBackwardJob,
    GenerateJob,
    Job,
    OptimStepJob,
    SaveAdapterJob,
    ScoreJob,
    Work,
    WorkerStatus,
)
from onebase.server.parking import Parking, overdue
from onebase.server.scheduler import Scheduler
from onebase.server.tasks import GenerateTask, PassTask, ScoreTask, StepTask

FILE_THREADS = 4
"""So many adapters are read or written at once; the others wait."""


class Worker:
    """Runs jobs on an engine.

    Args:
        engine: nobody else may call it from now on.
        limits: how many jobs may wait, and the largest rank to load.
        budget: most tokens of one engine step.
    """

    def __init__(self, engine: Engine, limits: Limits, budget: Budget = CPU_BUDGET) -> None:
        self._engine = engine
        self._limits = limits
        self._scheduler = Scheduler(budget.step_tokens, budget.train_tokens)
        self._inbox: deque[Job[Any]] = deque()
        self._wake = threading.Condition()
        self._admin: deque[Job[Any]] = deque()
        self._tasks: list[AnyTask] = []
        self._counts: Counter[str] = Counter()  # unfinished jobs by session
        self._draining = False
        self._stop = False
        self._steps = 0
        self._executor = Executor(engine, limits, self._begin_aside)
        self._parking = Parking(engine, limits.max_rank, self._begin_aside, self._admit)
        self._turn: float | None = None  # when the turn under way began; None while there is nothing to do
        self._files = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="onebase-files")
        self._back: deque[tuple[Job[Any], Aside, Future[Any]]] = deque()  # from those threads
        self._thread = threading.Thread(target=self._run, name="onebase-worker", daemon=True)

    # --------------------------------------------------------------------------------------- for other threads

    @property
    def facts(self) -> BaseFacts:
        """What the base is."""
        return self._engine.facts

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def submit(self, job: Job[Any]) -> None:
        """Takes a job in; its future is resolved later, on the worker's thread.

        Raises:
            Unavailable: the server drains.
            ResourceExhausted: too many jobs wait, of this session or in all.
        """
        with self._wake:
            if self._stop or (self._draining and not isinstance(job, SaveAdapterJob)):
                raise Unavailable("DRAINING", "the server is shutting down: connect again later", retry_after=5.0)
            if job.work is not Work.ADMIN:
                self._check_room(job.session)
            self._counts[job.session] += 1
            job.done.add_done_callback(lambda _: self._forget(job.session))
            self._inbox.append(job)
            self._wake.notify()

    def _check_room(self, session: str) -> None:
        limits = self._limits
        if self._counts.total() >= limits.max_queued_requests:
            raise ResourceExhausted(
                "QUEUE_FULL",
                f"{self._counts.total()} requests are waiting, the server's limit: try again",
                retry_after=1.0,
            )
        if session and self._counts[session] >= limits.max_queued_requests_per_session:
            raise ResourceExhausted(
                "SESSION_QUEUE_FULL",
                f"{self._counts[session]} requests of this session are waiting, its limit: wait for some of them",
                retry_after=0.5,
            )

    def _forget(self, session: str) -> None:
        with self._wake:
            self._counts[session] -= 1
            if self._counts[session] <= 0:
                del self._counts[session]

    def status(self) -> WorkerStatus:
        """What it is doing now."""
        tasks = list(self._tasks)
        waiting = Counter(job.work for job in list(self._inbox)) + Counter(t.work for t in tasks if not t.begun)
        waiting += self._parking.waiting()
        kv = self._engine.kv
        return WorkerStatus(
            waiting={work: waiting[work] for work in Work},
            running={work: sum(1 for t in tasks if t.begun and t.work is work) for work in Work},
            generated_tokens_per_second=self._executor.generated.rate(),
            scored_tokens_per_second=self._executor.scored.rate(),
            trained_tokens_per_second=self._executor.trained.rate(),
            engine_steps=self._steps,
            kv_cache_bytes=kv.bytes,
            kv_slots_used=kv.used,
            kv_slots=kv.slots,
        )

    def stuck_seconds(self) -> float:
        """How long the turn under way has gone on; 0 while there is nothing to do."""
        began = self._turn
        return 0.0 if began is None else time.monotonic() - began

    def drain(self, seconds: float) -> None:
        """Refuses new jobs, except to save adapters, and lets those under way finish for so long."""
        with self._wake:
            self._draining = True
        until = time.monotonic() + seconds
        while self._counts and time.monotonic() < until:
            time.sleep(0.02)

    def stop(self, drain_seconds: float) -> None:
        """Drains, ends the rest with Unavailable, and returns."""
        self.drain(drain_seconds)
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------------------------- the worker's thread

    def _run(self) -> None:
        while self._take_in():
            try:
                self._drop()
                while self._admin:
                    self._run_admin(self._admin.popleft())
                while self._back:
                    self._take_back(*self._back.popleft())
                self._work()
            except Exception as error:  # a bug in here must not hang every client
                self._fail_all(told(error))
        self._fail_all(_gone())
        self._files.shutdown(cancel_futures=True)
        while self._back:
            self._take_back(*self._back.popleft())
        for job in (*self._admin, *self._inbox):
            job.done.set_exception(_gone())

    def _take_in(self) -> bool:
        """Waits until there is something to do, and sorts new jobs into their queues; False to stop."""
        with self._wake:
            self._turn = None
            while not (self._inbox or self._tasks or self._admin or self._back or self._stop):
                if not self._wake.wait(self._parking.patience):
                    break
            if self._stop:
                return False
            self._turn = time.monotonic()
            jobs = list(self._inbox)
            self._inbox.clear()
        for job in jobs:
            self._admit(job)
        return True

    def _admit(self, job: Job[Any]) -> None:
        if self._parking.keep(job):
            return
        scheduler = self._scheduler
        if isinstance(job, ScoreJob):
            score = ScoreTask(job)
            self._tasks.append(score)
            scheduler.scores[job.work].push(job.session, score)
        elif isinstance(job, GenerateJob):
            generate = GenerateTask(job, scheduler.step_tokens)
            self._tasks.append(generate)
            scheduler.prompts.push(job.session, generate)
        elif isinstance(job, ForwardBackwardJob | OptimStepJob | DropGradientsJob):
            train = self._train_task(job)
            self._tasks.append(train)
            scheduler.trains.push(job.adapter, train)
        else:
            self._admin.append(job)

    def _train_task(self, job: ForwardBackwardJob | OptimStepJob | DropGradientsJob) -> PassTask | StepTask:
        if isinstance(job, ForwardBackwardJob):
            return PassTask(job, self._scheduler.train_tokens)
        return StepTask(job)

    def _drop(self) -> None:
        """Ends what was cancelled or is too late."""
        now = time.monotonic()
        for task in list(self._tasks):
            if (error := overdue(task.job, now)) is not None:
                self._end(task, error)
        self._parking.drop()

    def _end(self, task: AnyTask, error: OnebaseError | None = None) -> None:
        """Takes a task out of every queue, and fails it if an error is given."""
        if error is not None:
            task.fail(self._engine, error)
        if isinstance(task, ScoreTask):
            for queue in self._scheduler.scores.values():
                queue.remove(task.session, task)
        elif isinstance(task, GenerateTask):
            self._scheduler.prompts.remove(task.session, task)
        else:
            self._scheduler.trains.remove(task.adapter, task)
        if task in self._tasks:
            self._tasks.remove(task)

    def _fail_all(self, error: OnebaseError) -> None:
        for task in list(self._tasks):
            self._end(task, error)
        self._parking.fail_all(error)

    def _work(self) -> None:
        """One engine step, if there is anything to do."""
        running = [c for task in self._tasks if isinstance(task, GenerateTask) for c in task.running]
        plan = self._scheduler.plan(running=len(running), slots=self._slots)
        if plan.empty:
            return
        began = time.perf_counter()
        training = bool(plan.trains or plan.steps)
        if training:
            self._executor.train(plan)
        else:
            self._executor.infer(plan, running)
        self._scheduler.account(training=training, seconds=time.perf_counter() - began)
        self._steps += 1
        for task in list(self._tasks):
            if task.ended:
                self._end(task)
            elif isinstance(task, GenerateTask):
                self._scheduler.keep_prompts(task)
        if not self._tasks:
            self._engine.rest()

    def _slots(self, length: int) -> int:
        """How many completions of so many tokens may begin; one that could never be held may begin, and is refused."""
        kv = self._engine.kv
        return kv.free(length if kv.holds(length) else 1)

    def _run_admin(self, job: Job[Any]) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        try:
            if job.cancelled:
                raise Cancelled("CANCELLED", "the client cancelled")
            if isinstance(job, EvictAdapterJob):
                result: object = self._parking.evict(job, (*self._admin, *(task.job for task in self._tasks)))
            else:
                result = self._executor.admin(job)
        except Exception as error:
            job.done.set_exception(told(error))
            return
        if isinstance(result, Aside):
            self._begin_aside(job, result)
        else:
            job.done.set_result(result)

    def _begin_aside(self, job: Job[Any], aside: Aside) -> None:
        self._files.submit(aside.work).add_done_callback(lambda done: self._bring_back(job, aside, done))

    def _bring_back(self, job: Job[Any], aside: Aside, done: Future[Any]) -> None:
        """Called on a thread of the files."""
        with self._wake:
            self._back.append((job, aside, done))
            self._wake.notify()

    def _take_back(self, job: Job[Any], aside: Aside, done: Future[Any]) -> None:
        aside.release()
        try:
            if done.cancelled():
                raise _gone()
            result = aside.accept(done.result())
        except Exception as error:
            job.done.set_exception(told(error))
        else:
            job.done.set_result(result)


def _gone() -> Unavailable:
    return Unavailable("DRAINED", "the server shut down before this was done: repeat it later", retry_after=5.0)
