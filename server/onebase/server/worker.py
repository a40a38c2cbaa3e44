"""The worker: the one thread that owns the device. It takes jobs in, asks the scheduler, runs steps, resolves futures.

loop:  take in new jobs  →  drop what was cancelled or is too late  →  plan  →  one engine step  →  answer

Files are read and written on threads beside it, so that no step waits for a disk: what they read of the device does not
change, and what they make is taken in between two steps.

What goes wrong in a job ends that job (`isolation`). An error that comes out of the loop itself, or one after which no
number of the device can be trusted, ends the worker: whatever waits is answered UNAVAILABLE, and nothing more counts.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Hashable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

from onebase.server import failpoints
from onebase.server.completions import GenerateTask
from onebase.server.config import CPU_BUDGET, Budget, Limits
from onebase.server.engine import Engine
from onebase.server.errors import OnebaseError, ResourceExhausted, Unavailable, drained, not_there
from onebase.server.executor import Aside, Executor
from onebase.server.filing import Filing, waits_for_a_thread
from onebase.server.isolation import AnyTask, told
from onebase.server.jobs import (
    BaseFacts,
    DeleteAdapterJob,
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
    adapters_of,
)
from onebase.server.memory import is_out_of_memory
from onebase.server.parking import LOOK_SECONDS, Parking, overdue
from onebase.server.pressure import Pressure
from onebase.server.scheduler import Scheduler
from onebase.server.tasks import PassTask, ScoreTask, StepTask
from onebase.server.turns import Owner

log = logging.getLogger(__name__)

FILE_THREADS = 4
"""So many adapters are read or written at once; the others wait."""

JOIN_SECONDS = 30.0
"""So long the worker's thread, and those of the files, may take to end; then they are given up."""

RESTART_SECONDS = 2.0
"""What clients are told to wait at least after a crash."""


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
        self._leaving: list[DeleteAdapterJob] = []  # while work that came before waits for their adapters
        self._tasks: list[AnyTask] = []
        self._unfinished = 0
        self._counts: Counter[str] = Counter()  # unfinished jobs by session, but for those on adapters themselves
        self._jobs: set[Job[Any]] = set()  # that were not answered yet
        self._refused: Counter[Owner] = Counter()  # requests, since the last turn
        self._draining = False
        self._cut = False  # what is under way ends, and only saves are taken
        self._was_cut = threading.Event()
        self._stop = False
        self._lost = ""  # the ticket under which the log says why the engine cannot be trusted any more
        self._train_tokens = budget.train_tokens  # passes are cut by this, whatever memory there is
        self._pressure = Pressure(self._scheduler, engine.kv)
        self._steps = 0
        self._executor = Executor(engine, limits, self._begin_aside)
        self._filing = Filing(FILE_THREADS)
        self._parking = Parking(engine, limits.max_rank, self._begin_aside, self._admit)
        self._turn: float | None = None  # when the turn under way began; None while there is nothing to do
        self._files = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="onebase-files")
        self._back: deque[tuple[Job[Any], Aside, Future[Any]]] = deque()  # from those threads
        self._started = False
        self._thread = threading.Thread(target=self._run, name="onebase-worker", daemon=True)

    # --------------------------------------------------------------------------------------- for other threads

    @property
    def facts(self) -> BaseFacts:
        """What the base is."""
        return self._engine.facts

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()
        self._started = True

    def submit(self, job: Job[Any]) -> None:
        """Takes a job in; its future is resolved later, on the worker's thread.

        Raises:
            Unavailable: the server drains.
            ResourceExhausted: too many jobs wait, of this session or in all.
        """
        with self._wake:
            if self._lost:
                raise crashed(self._lost)
            if self._stop or (self._draining and not isinstance(job, SaveAdapterJob)):
                raise Unavailable("DRAINING", "the server is shutting down: connect again later", retry_after=5.0)
            if job.work is not Work.ADMIN:
                self._check_room(job.session)
                self._counts[job.session] += 1
            self._unfinished += 1
            self._follow(job)
            job.done.add_done_callback(lambda _: self._forget(job))
            self._inbox.append(job)
            self._wake.notify()

    def check(self, session: str) -> None:
        """Refuses whom `submit` would refuse for want of room.

        Raises:
            ResourceExhausted: too many jobs wait, of this session or in all.
        """
        with self._wake:
            self._check_room(session)

    def refused(self, tenant: str, session: str) -> None:
        """Notes that a request was refused for want of room: whose it was pays for that with turns."""
        with self._wake:
            self._refused[Owner(tenant, session)] += 1

    def _follow(self, job: Job[Any]) -> None:
        """Knows a job until it is answered."""
        self._jobs.add(job)
        job.done.add_done_callback(lambda _: self._jobs.discard(job))

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

    def _forget(self, job: Job[Any]) -> None:
        with self._wake:
            self._unfinished -= 1
            if job.work is not Work.ADMIN:
                self._counts[job.session] -= 1
                if self._counts[job.session] <= 0:
                    del self._counts[job.session]

    def status(self) -> WorkerStatus:
        """What it is doing now."""
        tasks = list(self._tasks)
        waiting = Counter(job.work for job in list(self._inbox)) + Counter(t.work for t in tasks if not t.begun)
        waiting += self._parking.waiting() + self._filing.waiting()
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

    def lost(self) -> str:
        """The ticket under which the log says why the engine cannot be trusted any more; "" while it can."""
        if self._started and not (self._lost or self._stop or self._thread.is_alive()):
            self.abandon("the engine's thread ended without a word")
        return self._lost

    def abandon(self, why: str, error: BaseException | None = None) -> str:
        """Answers all work UNAVAILABLE, and lets nothing count that the engine still does. Returns the ticket."""
        with self._wake:
            if self._lost:
                return self._lost
            self._lost = uuid.uuid4().hex[:12]
            self._wake.notify()
            unanswered = list(self._jobs)
        log.critical("the engine is lost, ticket %s: %s", self._lost, why, exc_info=error)
        self._files.shutdown(wait=False, cancel_futures=True)
        for job in unanswered:
            with contextlib.suppress(InvalidStateError):  # answered just now
                job.done.set_exception(crashed(self._lost))
        return self._lost

    def drain(self, seconds: float) -> None:
        """Refuses new jobs, except to save adapters, and lets those under way finish for so long."""
        with self._wake:
            self._draining = True
        until = time.monotonic() + seconds
        while self._unfinished and time.monotonic() < until:
            time.sleep(0.02)

    def cut_off(self) -> None:
        """Ends with Unavailable what is under way, but for adapters that are saved; returns when that is so.

        The step under way is waited for, unless the worker is given up meanwhile.
        """
        with self._wake:
            self._draining = self._cut = True
            self._wake.notify()
        while self._thread.is_alive() and not (self._lost or self._was_cut.wait(LOOK_SECONDS)):
            pass

    def stop(self, drain_seconds: float) -> None:
        """Drains, ends the rest with Unavailable, and returns; a thread that does not end is given up."""
        self.drain(drain_seconds)
        with self._wake:
            self._stop = True
            self._wake.notify()
        until = time.monotonic() + JOIN_SECONDS
        while self._thread.is_alive() and not self._lost:  # a lost one may never end
            self._thread.join(LOOK_SECONDS)
            if time.monotonic() > until:
                self.abandon(f"its threads did not end within {JOIN_SECONDS:g} s")

    # ------------------------------------------------------------------------------------- the worker's thread

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # whatever it is: who knows what it left half done
            self.abandon(f"{type(error).__name__} in its loop", error)

    def _loop(self) -> None:
        while self._take_in():
            failpoints.hit("worker")
            self._drop()
            while self._back:
                self._take_back(*self._back.popleft())
            while self._admin:
                self._run_admin(self._admin.popleft())
            while (job := self._filing.next()) is not None:
                if not self._run_admin(job):
                    self._filing.ended(job)
            self._work()
            self._let_go()
        if self._lost:
            return
        self._fail_all(drained())
        self._files.shutdown(cancel_futures=True)
        while self._back:
            self._take_back(*self._back.popleft())
        for job in (*self._admin, *self._filing.jobs, *self._leaving, *self._inbox):
            job.done.set_exception(drained())

    def _take_in(self) -> bool:
        """Waits until there is something to do, and sorts new jobs into their queues; False to stop."""
        with self._wake:
            self._turn = None
            while not (self._inbox or self._tasks or self._admin or self._back or self._must_look()):
                patience = LOOK_SECONDS if self._filing.jobs else self._parking.patience
                if not self._wake.wait(patience):
                    break
            if self._stop or self._lost:
                return False
            self._turn = time.monotonic()
            jobs, refused = list(self._inbox), self._refused
            self._inbox.clear()
            self._refused = Counter()
        if self._cut:
            jobs = self._end_all_but_saves(jobs)
        for owner, count in refused.items():
            self._scheduler.refused(owner, count)
        for job in jobs:
            if isinstance(job, DeleteAdapterJob) and self._waits(job.adapter):
                self._leaving.append(job)  # whoever came before, when the name meant it, still gets an answer
            elif any(leaving.adapter in adapters_of(job) for leaving in self._leaving):
                self._fail(job, not_there())
            else:
                self._admit(job)
        return True

    def _must_look(self) -> bool:
        return self._stop or bool(self._lost) or (self._cut and not self._was_cut.is_set())

    def _end_all_but_saves(self, jobs: list[Job[Any]]) -> list[Job[Any]]:
        """Fails what is under way and has come, once the server is cut off; the saves that have come."""
        saves: list[Job[Any]] = [job for job in jobs if isinstance(job, SaveAdapterJob)]
        ended = [job for job in jobs if job not in saves]
        if not self._was_cut.is_set():
            self._fail_all(drained())
            ended += [
                job for job, _ in self._filing.drop(lambda j: None if isinstance(j, SaveAdapterJob) else drained())
            ]
            ended += [job for job in self._admin if not isinstance(job, SaveAdapterJob | EvictAdapterJob)]
            self._admin = deque(job for job in self._admin if job not in ended)
        for job in ended:
            self._fail(job, drained())
        self._was_cut.set()
        return saves

    def _admit(self, job: Job[Any]) -> None:
        if self._parking.keep(job):
            return
        scheduler = self._scheduler
        if isinstance(job, ScoreJob):
            score = ScoreTask(job)
            self._tasks.append(score)
            scheduler.scores[job.work].push(score.owner, score)
        elif isinstance(job, GenerateJob):
            generate = GenerateTask(job, lambda: scheduler.step_tokens)
            self._tasks.append(generate)
            scheduler.prompts.push(generate.owner, generate)
        elif isinstance(job, ForwardBackwardJob | OptimStepJob | DropGradientsJob):
            train = self._train_task(job)
            self._tasks.append(train)
            scheduler.trains.push(job.adapter, train)
        elif waits_for_a_thread(job):
            self._filing.keep(job)
        else:
            self._admin.append(job)

    def _train_task(self, job: ForwardBackwardJob | OptimStepJob | DropGradientsJob) -> PassTask | StepTask:
        if isinstance(job, ForwardBackwardJob):
            return PassTask(job, self._train_tokens)
        return StepTask(job)

    def _drop(self) -> None:
        """Ends what was cancelled or is too late."""
        now = time.monotonic()
        for task in list(self._tasks):
            if (error := overdue(task.job, now)) is not None:
                self._end(task, error)
        self._parking.drop()
        for job, refusal in self._filing.drop(lambda job: overdue(job, now)):
            self._fail(job, refusal)

    def _end(self, task: AnyTask, error: OnebaseError | None = None) -> None:
        """Takes a task out of every queue, and fails it if an error is given."""
        if error is not None:
            task.fail(self._engine, error)
        if isinstance(task, ScoreTask):
            for queue in self._scheduler.scores.values():
                queue.remove(task.owner, task)
        elif isinstance(task, GenerateTask):
            self._scheduler.prompts.remove(task.owner, task)
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
        plan = self._scheduler.plan(running=len(running), slots=self._slots, parties=self._parties)
        if plan.empty:
            return
        began = time.perf_counter()
        training = bool(plan.trains or plan.steps)
        if training:
            self._executor.train(plan)
        else:
            self._executor.infer(plan, running)
        self._pressure.learn(training=training, too_many=self._executor.too_many)
        self._scheduler.account(training=training, seconds=time.perf_counter() - began)
        self._steps += 1
        for task in list(self._tasks):
            if task.ended:
                self._end(task)
            elif isinstance(task, GenerateTask):
                self._scheduler.keep_prompts(task)
        if not self._tasks:
            self._engine.rest()

    def _parties(self) -> frozenset[Hashable]:
        """Who has anything under way."""
        return frozenset(task.owner.party for task in self._tasks)

    def _slots(self, length: int) -> int:
        """How many completions of so many tokens may begin; one that could never be held may begin, and is refused."""
        kv = self._engine.kv
        return kv.free(length if kv.holds(length) else 1)

    def _run_admin(self, job: Job[Any]) -> bool:
        """Does a job; whether a thread beside this one has begun to do its part of it."""
        if not job.done.set_running_or_notify_cancel():
            return False
        try:
            if (refusal := overdue(job, time.monotonic())) is not None:
                raise refusal
            if isinstance(job, EvictAdapterJob):
                others = (*self._admin, *self._filing.jobs, *(task.job for task in self._tasks))
                result: object = self._parking.evict(job, others)
            else:
                result = self._executor.admin(job)
            if isinstance(result, Aside):
                self._begin_aside(job, result)
                return True
        except Exception as error:
            self._fail(job, error)
        else:
            self._succeed(job, result)
        return False

    def _waits(self, uid: int) -> bool:
        """Whether work that means an adapter waits to begin; what has begun has it."""
        jobs = (*(task.job for task in self._tasks if not task.begun), *self._parking.jobs, *self._admin)
        jobs = (*jobs, *self._filing.jobs)
        return any(uid in adapters_of(job) for job in jobs)

    def _let_go(self) -> None:
        """Deletes the adapters for which no work waits any more."""
        waiting = [job for job in self._leaving if self._waits(job.adapter)]
        ready = [job for job in self._leaving if job not in waiting]
        self._leaving = waiting
        for job in ready:
            self._run_admin(job)

    def _begin_aside(self, job: Job[Any], aside: Aside) -> None:
        def work() -> Any:
            failpoints.hit("files")
            return aside.work()

        try:
            begun = self._files.submit(work)
        except BaseException:  # there may be no room for another thread
            aside.release()
            raise
        self._follow(job)
        begun.add_done_callback(lambda done: self._bring_back(job, aside, done))

    def _bring_back(self, job: Job[Any], aside: Aside, done: Future[Any]) -> None:
        """Called on a thread of the files."""
        with self._wake:
            self._back.append((job, aside, done))
            self._wake.notify()

    def _take_back(self, job: Job[Any], aside: Aside, done: Future[Any]) -> None:
        self._filing.ended(job)
        aside.release()
        error = drained() if done.cancelled() else done.exception()
        if error is None:
            try:
                result = aside.accept(done.result())
            except Exception as refusal:
                error = refusal
            else:
                self._succeed(job, result)
        if error is not None:
            self._fail(job, error)

    def _fail(self, job: Job[Any], error: BaseException) -> None:
        answer = told(error)
        if is_out_of_memory(error):
            self._engine.relieve()
        with contextlib.suppress(InvalidStateError):  # answered from elsewhere: the engine is lost
            job.done.set_exception(answer)

    def _succeed(self, job: Job[Any], result: object) -> None:
        with contextlib.suppress(InvalidStateError):
            job.done.set_result(result)


def crashed(ticket: str) -> Unavailable:
    """What is told of work that a lost engine had, or is asked for."""
    return Unavailable(
        "WORKER_CRASHED",
        f"the engine crashed, logged as {ticket}: repeat the call when the server has started again",
        retry_after=RESTART_SECONDS,
    )
