"""What the next engine step does. No tensor in here, and no clock but the one that is passed in.

Kinds of work, in the order in which a step takes them: small score jobs of people and single calls (interactive),
tokens of running completions, then prompts of new ones and bulk score jobs, which alternate. Training shares the device
with all of these by time. Inside a kind, tenants take turns by the tokens they have been served, and inside a tenant
its sessions (`turns`). So nobody's long queue holds up another's short one, and many sessions get a tenant no more than
one does; the adapters that a session trains share its turns.

What everybody may count on, whatever others do, where n tenants have interactive rows. What is said of tenants is so of
the sessions of one tenant among themselves; and the operator's sessions count as a tenant each in what may go ahead.

* Size. A step has at most `step_tokens` tokens, running completions included, or `train_tokens` if it trains, unless a
  single row is longer. While interactive rows wait, prompts and bulk rows take at most an eighth of `step_tokens`; one
  that is longer goes first once they have kept it out of 3 steps.
* Interactive. A tenant's row is in the next step if no waiting tenant was served less, if the tenant has not been
  ahead of training, prompts or bulk rows since their last turns, and if rows of other such tenants leave room. Of any
  three steps while interactive rows wait, one has some.
* Prompts and bulk rows. Interactive rows keep them out of at most 3 + n steps in a row; of their turns, each has every
  other. A prompt that waits for slots gets the next ones.
* Training. While it and work that is not interactive wait, neither gets more device time than the other by more than
  the longest step of each. Interactive rows may go ahead of it for as long as its last step took, one step more, and
  two steps more for each of the n tenants. That is shared by all who have such rows or training: a tenant that always
  has rows keeps the others' training waiting for its own share of that, and no longer.
* Tenants that both want something of one kind throughout. Scored tokens differ by at most two of the longest rows. A
  request and an adapter have one turn in a step; in steps that leave the other tenant out, neither gets more tokens
  than the other does in all, but for three of the largest turns.
* Absence. Who comes back is level with those who waited, but for one of the largest turns.
* Refusals. To refuse a request costs the others time too. Who is refused for want of room owes that time, and while
  others have anything under way pays with an equal share of the device's: until then nothing new of it is planned,
  but for a little after each seven steps without.

So every request is done in a time that depends on what its session had waiting when it came, on the number of
tenants, of its own tenant's sessions, and on the longest step, and on nothing that comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from onebase.server.jobs import Work
from onebase.server.turns import Debts, FairQueue, Lead, Owner, Shares, TenantQueue, Turns

_AHEAD_OF_REST = 3
"""Steps in a row out of which interactive rows may keep prompts and bulk rows."""

_AHEAD_OF_TRAINING = 1
"""How many times as long as a training step interactive work may go ahead of the next one."""

_REFUSAL_SECONDS = 0.002
"""What it costs to refuse a request: gRPC's work above all, in which no step gets on."""

_MOST_DEBT = 0.25
"""Seconds: two are over before eight tenants' one that floods no more is served as before."""

_LET_IN = 7
"""After so many steps without, those too get a little who owe time."""

Slots = Callable[[int], int]
"""How many more completions of so many tokens may begin."""

Parties = Callable[[], frozenset[Hashable]]
"""Tenants, and sessions of the operator."""


class Task(Protocol):
    """Something under way that wants engine steps."""

    @property
    def owner(self) -> Owner:
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
    def under_way(self) -> bool:
        """Whether its next prompt only goes on, in the slots that it has."""

    def next_slots(self) -> int:
        """Slots that its next prompt can use; 0 if it is under way."""

    def next_length(self) -> int:
        """Tokens that each of these slots must hold."""

    def next_cost(self) -> int:
        """Tokens of its next prompt, or of the next part of a long one; 0 when all completions have begun."""


class TrainWork(Task, Protocol):
    """A pass or a step of one adapter; those of one adapter keep their order."""

    @property
    def adapter(self) -> int:
        """The uid of its adapter."""

    def next_cost(self) -> int:
        """Tokens of its next micro-batch; 0 for an optimizer step."""


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

    def parties(self) -> frozenset[Hashable]:
        """Whose rows, prompts, passes and steps these are."""
        tasks = (*(task for task, _ in self.scores), *self.prompts, *self.trains, *self.steps)
        return frozenset(task.owner.party for task in tasks)


class Scheduler:
    """Queues of all kinds of work, and the plan of the next step.

    Args:
        step_tokens: most tokens of one step; a single longer row makes a step of its own.
        train_tokens: most tokens of a training step, whose activations are held until its backward pass; without it,
            step_tokens.
    """

    def __init__(self, step_tokens: int, train_tokens: int | None = None) -> None:
        self.step_tokens = step_tokens
        self.train_tokens = train_tokens or step_tokens
        self.scores: dict[Work, TenantQueue[ScoreWork]] = {Work.INTERACTIVE: TenantQueue(), Work.SCORE: TenantQueue()}
        self.prompts: TenantQueue[GenerateWork] = TenantQueue(credit=1)
        self.trains: FairQueue[TrainWork] = FairQueue()  # by adapter: its passes and steps keep their order
        self._trainers = Shares(credit=1)  # tenants and sessions with passes
        self._sides = Turns()  # training and inference, in seconds
        self._rest = [Work.GENERATE, Work.SCORE]  # the first goes first
        self._ahead_of_rest = Lead()  # in steps
        self._ahead_of_training = Lead()  # in seconds
        self._jumpers: set[Hashable] | None = None  # if the present step goes ahead of training, who let it
        self._debts = Debts(_MOST_DEBT)
        self._parties = 1  # who had something under way in the present step
        self._held_out = 0  # steps in which those who owe time got nothing

    def refused(self, owner: Owner, count: int = 1) -> None:
        """Notes that requests were refused for want of room."""
        self._debts.add(owner.party, count * _REFUSAL_SECONDS)

    def account(self, *, training: bool, seconds: float) -> None:
        """Notes how long the device worked for one side."""
        if self._debts:
            self._debts.pay(seconds / self._parties)
        self._sides.charge("training" if training else "inference", seconds)
        if training:
            self._ahead_of_training.renew(_AHEAD_OF_TRAINING * seconds)
        elif self._jumpers is not None:
            self._ahead_of_training.use(self._jumpers, seconds)

    def plan(self, *, running: int, slots: Slots, parties: Parties = frozenset) -> Plan:
        """The next step.

        Args:
            running: completions under way.
            slots: free places for new ones.
            parties: who has anything under way; asked for while somebody owes time.
        """
        held = self._hold(parties) if self._debts else frozenset()
        plan = self._plan(running, slots, held)
        if held and plan.empty:
            plan = self._plan(running, slots, frozenset())
        self._held_out = self._held_out + 1 if held and held.isdisjoint(plan.parties()) else 0
        return plan

    def _hold(self, parties: Parties) -> frozenset[Hashable]:
        """Who owes time, if others have anything under way."""
        there, debtors = parties(), self._debts.debtors
        self._parties = max(1, len(there))
        return debtors if there - debtors else frozenset()

    def _plan(self, running: int, slots: Slots, held: frozenset[Hashable]) -> Plan:
        let_in = bool(held) and self._held_out >= _LET_IN
        out = frozenset[Hashable]() if let_in else held
        heads = self._heads(out)
        inference = bool(running or any(self._waits(kind, slots, out) for kind in (Work.INTERACTIVE, *self._rest)))
        behind = self._sides.tag("training") <= self._sides.tag("inference")
        turn = bool(heads) and (behind or not inference)
        barred = self._ahead_of_training.barred(self._sharers(heads)) if turn else frozenset()
        self._jumpers = None
        if turn and self.scores[Work.INTERACTIVE].next(barred, held) is None:
            return self._plan_training(heads)
        plan = self._plan_inference(running, slots, barred, held, let_in=let_in)
        if turn:
            self._jumpers = {task.owner.party for task, _ in plan.scores if task.work is Work.INTERACTIVE}
        return plan

    def _heads(self, held: frozenset[Hashable]) -> list[TrainWork]:
        """What each adapter's training does next, but for that of parties that are held."""
        heads = (self.trains.first(adapter) for adapter in self.trains.owners())
        return [task for task in heads if task.owner.party not in held]

    def _sharers(self, heads: list[TrainWork]) -> int:
        """How many have interactive rows or training that waits, one at least."""
        return max(1, len(self.scores[Work.INTERACTIVE].parties() | {task.owner.party for task in heads}))

    def keep_prompts(self, task: GenerateWork) -> None:
        """Lets a task stand in the queue of prompts exactly while it has some to begin."""
        queued = self.prompts.has(task.owner, task)
        if task.next_cost() and not queued:  # a completion had to give up its slot
            self.prompts.push(task.owner, task)
        elif queued and not task.next_cost():
            self.prompts.remove(task.owner, task)

    def _plan_inference(
        self, running: int, slots: Slots, barred: frozenset[Hashable], held: frozenset[Hashable], *, let_in: bool
    ) -> Plan:
        """Rows and prompts; no interactive rows of those who may not go ahead of training.

        Of the held there is nothing; or, if they are let in, a few rows, and their turns of prompts and bulk rows, for
        which interactive rows leave room in this step.
        """
        plan, room = Plan(decode=running > 0), self.step_tokens - running
        interactive = self.scores[Work.INTERACTIVE]
        share = min(room, self.step_tokens // 8)
        most = share if interactive.waits(held) else room
        held_of_rest, left_to_rest = held, 0
        if let_in:
            # Who was served least goes: those who owe time, or somebody level with them.
            room -= self._take_scores(plan, interactive, share, barred | self._ahead_of_rest.barred())
            held_of_rest = frozenset()
            left_to_rest = share if any(self._waits(kind, slots, held_of_rest) for kind in self._rest) else 0
        first = max(0, room - left_to_rest)
        room -= self._take_scores(plan, interactive, first, barred | self._ahead_of_rest.barred(), held)
        room -= self._take_rest(plan, min(room, most), slots, held_of_rest, whole=room >= share)
        room -= self._take_scores(plan, interactive, room, barred, held)
        return plan

    def _take_rest(self, plan: Plan, budget: int, slots: Slots, held: frozenset[Hashable], *, whole: bool) -> int:
        """Plans prompts and bulk rows, those first whose turn it is: their tokens.

        Whoever gets nothing, or less than the whole share, keeps the turn.
        """
        kinds, left = [kind for kind in self._rest if self._waits(kind, slots, held)], budget
        ahead = {task.owner.party for task, _ in plan.scores}
        for kind in kinds:
            if kind is Work.GENERATE:
                taken = self._take_prompts(plan, left, slots, held)
            else:
                taken = self._take_scores(plan, self.scores[kind], left, held=held)
            left -= taken
            if kind is kinds[0] and taken and whole:
                self._rest.append(self._rest.pop(self._rest.index(kind)))
                self._ahead_of_rest.renew(_AHEAD_OF_REST)
            elif kind is kinds[0]:
                self._ahead_of_rest.use(ahead, 1)
        return budget - left

    def _waits(self, kind: Work, slots: Slots, held: frozenset[Hashable]) -> bool:
        """Whether there are prompts that can go on or begin, or rows of a kind, of anybody who is not held."""
        return any(self._ready(slots, held)) if kind is Work.GENERATE else self.scores[kind].waits(held)

    def _ready(self, slots: Slots, held: frozenset[Hashable]) -> Iterator[tuple[Owner, GenerateWork]]:
        """Prompts that can go on, and those that can begin: none may take a place that one before it waits for."""
        begun, longest, full = 0, 0, False

        def able(task: GenerateWork) -> bool:
            return task.under_way or not (full or task.owner.party in held)

        for owner, task in self.prompts.in_turn(able):
            if not task.under_way:
                longest = max(longest, task.next_length())
                free = slots(longest) - begun
                full = free <= 0  # and so for those behind it: it would wait for ever
                if full:
                    continue
                begun += min(task.next_slots(), free)
            yield owner, task

    def _take_scores(
        self,
        plan: Plan,
        queue: TenantQueue[ScoreWork],
        budget: int,
        barred: frozenset[Hashable] = frozenset(),
        held: frozenset[Hashable] = frozenset(),
    ) -> int:
        """Plans rows by turns, up to those of somebody who is barred, without those of who is held: their tokens."""
        left = budget
        while owner := queue.next(barred, held):
            task = queue.first(owner)
            cost = task.next_cost()
            if cost > left and (plan.scores or plan.prompts):
                break
            plan.scores.append((task, task.take()))
            queue.charge(owner, cost)
            left -= cost
            if not task.next_cost():
                queue.remove(owner, task)
        return budget - left

    def _take_prompts(self, plan: Plan, budget: int, slots: Slots, held: frozenset[Hashable]) -> int:
        """Plans prompts by turns, one of each request: their tokens."""
        left = budget
        for owner, task in self._ready(slots, held):
            cost = task.next_cost()
            if cost > left and (plan.scores or plan.prompts):
                break
            plan.prompts.append(task)
            self.prompts.charge(owner, cost)
            left -= cost
        return budget - left

    def _plan_training(self, heads: list[TrainWork]) -> Plan:
        """One micro-batch or step of each adapter, by turns of their owners, as many as fit."""
        plan, left = Plan(steps=[task for task in heads if not task.next_cost()]), self.train_tokens
        passes = [task for task in heads if task.next_cost()]
        while passes:
            task = min(passes, key=lambda task: self._trainers.tags(task.owner))
            cost = task.next_cost()
            if cost > left and plan.trains:
                break
            passes.remove(task)
            plan.trains.append(task)
            self.trains.charge(task.adapter, cost)
            self._trainers.charge(task.owner, cost)
            left -= cost
        return plan
