"""What the next engine step does. No tensor in here, and no clock but the one that is passed in.

Kinds of work, in the order in which a step takes them: small score jobs of people and single calls (interactive),
tokens of running completions, prompts of new ones, bulk score jobs. Training shares the device with all of these by
time: the side that has had less of it goes next, except that interactive work always goes first. Inside a kind,
sessions take turns by the tokens they have been served (start-time fair queueing: Goyal et al. 1996), so nobody's long
queue holds up another's short one; training takes turns by adapter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from onebase.server.jobs import Work


class Task(Protocol):
    """Something under way that wants engine steps."""

    @property
    def session(self) -> str:
        """Whose turn it takes."""

    @property
    def work(self) -> Work:
        """Its kind."""


class ScoreWork(Task, Protocol):
    """Rows to score."""

    def next_cost(self) -> int:
        """Tokens of its next row; 0 when all rows are planned."""

    def take(self) -> int:
        """Plans the next row: its index."""


class GenerateWork(Task, Protocol):
    """Prompts to complete."""

    @property
    def needs_slot(self) -> bool:
        """Whether its next prompt needs a free slot; one that is under way has its own."""

    def next_cost(self) -> int:
        """Tokens of its next prompt, or of the next part of a long one; 0 when all completions have begun."""


class TrainWork(Task, Protocol):
    """A pass or a step of one adapter; those of one adapter keep their order."""

    @property
    def adapter(self) -> int:
        """The uid of its adapter."""

    def next_cost(self) -> int:
        """Tokens of its next micro-batch; 0 for an optimizer step."""


T = TypeVar("T", bound=Task)


class FairQueue(Generic[T]):
    """Tasks of several owners; the owner that was served the fewest tokens goes next, his tasks in their order."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, deque[T]] = {}
        self._served: dict[Hashable, float] = {}
        self._floor = 0.0

    def __len__(self) -> int:
        return sum(len(tasks) for tasks in self._tasks.values())

    def __iter__(self) -> Iterator[T]:
        for tasks in self._tasks.values():
            yield from tasks

    def push(self, owner: Hashable, task: T) -> None:
        """Adds a task; an owner who was away begins level with those who waited, with no credit for the time."""
        if owner not in self._tasks:
            self._tasks[owner] = deque()
            self._served[owner] = max(self._served.get(owner, 0.0), self._floor)
        self._tasks[owner].append(task)

    def owners(self) -> list[Hashable]:
        """Owners with tasks, the least served first."""
        return sorted(self._tasks, key=lambda owner: self._served[owner])

    def first(self, owner: Hashable) -> T:
        """An owner's oldest task."""
        return self._tasks[owner][0]

    def charge(self, owner: Hashable, tokens: float) -> None:
        """Notes what an owner was served."""
        self._floor = max(self._floor, min(self._served[o] for o in self._tasks))
        self._served[owner] += tokens

    def has(self, owner: Hashable, task: T) -> bool:
        """Whether a task stands in the queue."""
        return task in self._tasks.get(owner, ())

    def remove(self, owner: Hashable, task: T) -> None:
        """Takes a task out, wherever it stands; nothing happens if it is not there."""
        tasks = self._tasks.get(owner)
        if tasks is None or task not in tasks:
            return
        tasks.remove(task)
        if not tasks:
            del self._tasks[owner]
            if len(self._served) > 4096:  # forget owners who left long ago
                self._served = {o: s for o, s in self._served.items() if o in self._tasks}


@dataclass
class Plan:
    """One engine step: rows to score, prompts to begin, whether running completions go on; or rows to train on."""

    scores: list[tuple[ScoreWork, int]] = field(default_factory=list)
    prompts: list[GenerateWork] = field(default_factory=list)
    decode: bool = False
    trains: list[TrainWork] = field(default_factory=list)  # one micro-batch each
    steps: list[TrainWork] = field(default_factory=list)  # optimizer steps

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.scores or self.prompts or self.decode or self.trains or self.steps)


class Scheduler:
    """Queues of all kinds of work, and the plan of the next step.

    Args:
        step_tokens: most tokens of one step; a single longer row makes a step of its own.
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.scores: dict[Work, FairQueue[ScoreWork]] = {Work.INTERACTIVE: FairQueue(), Work.SCORE: FairQueue()}
        self.prompts: FairQueue[GenerateWork] = FairQueue()
        self.trains: FairQueue[TrainWork] = FairQueue()
        self._seconds = {"inference": 0.0, "training": 0.0}
        self._prompts_first = False

    def account(self, *, training: bool, seconds: float) -> None:
        """Notes how long the device worked for one side."""
        self._seconds["training" if training else "inference"] += seconds

    def plan(self, *, running: int, slots: int) -> Plan:
        """The next step.

        Args:
            running: completions under way.
            slots: free places for new ones.
        """
        prompts = any(slots or not task.needs_slot for task in self.prompts)
        inference = bool(running or any(self.scores.values()) or prompts)
        training = bool(self.trains)
        if not (inference and training):  # time that nobody else wanted is not held against anyone
            level = max(self._seconds.values())
            self._seconds = {"inference": level, "training": level}
        urgent = bool(self.scores[Work.INTERACTIVE])
        if training and not urgent and (not inference or self._seconds["training"] <= self._seconds["inference"]):
            return self._plan_training()
        return self._plan_inference(running, slots)

    def keep_prompts(self, task: GenerateWork) -> None:
        """Lets a task stand in the queue of prompts exactly while it has some to begin."""
        queued = self.prompts.has(task.session, task)
        if task.next_cost() and not queued:  # a completion had to give up its slot
            self.prompts.push(task.session, task)
        elif queued and not task.next_cost():
            self.prompts.remove(task.session, task)

    def _plan_inference(self, running: int, slots: int) -> Plan:
        plan = Plan(decode=running > 0)
        budget = self.step_tokens - running
        budget = self._take_scores(plan, self.scores[Work.INTERACTIVE], budget)
        self._prompts_first = not self._prompts_first  # neither can fill every step
        if self._prompts_first:
            budget = self._take_prompts(plan, budget, slots)
        budget = self._take_scores(plan, self.scores[Work.SCORE], budget)
        if not self._prompts_first:
            self._take_prompts(plan, budget, slots)
        return plan

    def _take_scores(self, plan: Plan, queue: FairQueue[ScoreWork], budget: int) -> int:
        while queue:
            owner = queue.owners()[0]
            task = queue.first(owner)
            cost = task.next_cost()
            if cost > budget and (plan.scores or plan.prompts):
                break
            plan.scores.append((task, task.take()))
            queue.charge(owner, cost)
            budget -= cost
            if not task.next_cost():
                queue.remove(owner, task)
        return budget

    def _take_prompts(self, plan: Plan, budget: int, slots: int) -> int:
        """Begins at most one prompt of each session in a step; the worker takes as many of its n as have a place."""
        for owner in self.prompts.owners():
            task = self.prompts.first(owner)
            cost = task.next_cost()
            if task.needs_slot and not slots:
                continue
            if cost > budget and (plan.scores or plan.prompts):
                break
            plan.prompts.append(task)
            self.prompts.charge(owner, cost)
            budget -= cost
            slots -= task.needs_slot
        return budget

    def _plan_training(self) -> Plan:
        plan, budget = Plan(), self.step_tokens
        for owner in self.trains.owners():  # owners are adapters: each keeps the order of its passes and steps
            task = self.trains.first(owner)
            cost = task.next_cost()
            if not cost:
                plan.steps.append(task)
            elif cost <= budget or not plan.trains:
                plan.trains.append(task)
                self.trains.charge(owner, cost)
                budget -= cost
        return plan
