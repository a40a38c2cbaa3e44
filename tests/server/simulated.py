"""A device with a simulated clock that runs the real scheduler's plans, and what it saw."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

from onebase.server.identity import OPERATOR
from onebase.server.jobs import Work
from onebase.server.scheduler import Plan, Scheduler
from onebase.server.turns import Owner as Whose

STEP_TOKENS, TRAIN_TOKENS = 200, 120
INFERENCE = (Work.INTERACTIVE, Work.GENERATE, Work.SCORE)
Owner = tuple[Work, str]


def inference_seconds(tokens: int) -> float:
    return 0.02 + 0.001 * tokens


def training_seconds(tokens: int) -> float:
    return 0.02 + 0.003 * tokens


@dataclass(eq=False)
class Job:
    """A request and its task: rows to score, prompts to complete, or micro-batches (0: an optimizer step)."""

    work: Work
    session: str
    costs: list[int]
    adapter: int = 0
    completions: int = 1
    new_tokens: int = 3
    finished: bool = False
    place: int = 0  # rows, prompts or micro-batches that are done
    part: int = 0  # tokens of the present prompt that are in the cache
    begun: int = 0  # slots that it has for the present prompt
    tenant: str = OPERATOR

    @property
    def owner(self) -> Whose:
        return Whose(self.tenant, self.session)

    @property
    def under_way(self) -> bool:
        return bool(self.part)

    def next_cost(self) -> int:
        if self.place == len(self.costs):
            return 0
        cost = self.costs[self.place]
        return min(cost - self.part, STEP_TOKENS) if self.work is Work.GENERATE else cost

    def take(self) -> int:
        self.place += 1
        return self.place - 1

    def next_slots(self) -> int:
        return 0 if self.part else self.completions

    def next_length(self) -> int:
        return self.costs[self.place]

    @property
    def left(self) -> int:
        """Tokens that are not planned yet."""
        return sum(self.costs[self.place :]) - self.part


@dataclass
class Flood:
    """A session that always has more: `deep` is more than a step holds, otherwise the next job follows the answer."""

    work: Work
    session: str
    costs: list[int]
    deep: bool = True
    completions: int = 1
    begins: float = 0.0
    ends: float = float("inf")
    adapters: tuple[int, ...] = (0,)
    tenant: str = OPERATOR
    _costs: Iterator[int] = field(init=False)
    _jobs: dict[int, list[Job]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self._costs = cycle(self.costs)

    def refill(self, device: Device) -> None:
        for adapter in self.adapters if self.begins <= device.now < self.ends else ():
            jobs = self._jobs[adapter] = [job for job in self._jobs[adapter] if not job.finished]
            while not jobs or (self.deep and (len(jobs) < 2 or sum(job.left for job in jobs) <= 2 * STEP_TOKENS)):
                jobs.append(Job(self.work, self.session, [next(self._costs)], adapter, self.completions))
                jobs[-1].tenant = self.tenant
                device.submit(jobs[-1])


@dataclass
class Step:
    """What a step did, and who wanted something before it and after it."""

    training: bool
    began: float
    seconds: float
    running: int
    roomy: bool  # whether no prompt waited for a slot
    served: dict[Owner, list[int]]
    wanted: set[Owner]
    wanting: set[Owner]

    def tokens(self, *works: Work) -> int:
        return sum(sum(costs) for (work, _), costs in self.served.items() if work in works)

    def turns(self, *works: Work) -> int:
        return sum(bool(cost) for (work, _), costs in self.served.items() if work in works for cost in costs)

    def wants(self, *works: Work) -> bool:
        return any(work in works for work, _ in self.wanted)


class Device:
    """Runs plans; its seconds are tokens."""

    def __init__(self, slots: int = 12) -> None:
        self.scheduler = Scheduler(STEP_TOKENS, TRAIN_TOKENS)
        self.slots = slots
        self.now = 0.0
        self.steps: list[Step] = []
        self.jobs: list[Job] = []  # unfinished
        self.running: list[list[int]] = []  # of each completion, the tokens it has still to write

    @property
    def free(self) -> int:
        filling = sum(job.begun for job in self.jobs if job.work is Work.GENERATE and job.part)
        return self.slots - len(self.running) - filling

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        if job.work is Work.TRAIN:
            self.scheduler.trains.push(job.adapter, job)
        elif job.work is Work.GENERATE:
            self.scheduler.prompts.push(job.owner, job)
        else:
            self.scheduler.scores[job.work].push(job.owner, job)

    def backlog(self, owner: Owner) -> int:
        return sum(job.left for job in self.jobs if (job.work, job.session) == owner)

    def wants(self) -> set[Owner]:
        """Owners with something that could go now."""
        free = self.free
        able = (job for job in self.jobs if job.place < len(job.costs) and (not stuck(job) or free > 0))
        return {(job.work, job.session) for job in able}

    def step(self) -> Step | None:
        """Runs the next plan; None if there is nothing to do."""
        wanted, running = self.wants(), len(self.running)
        prompts = {job.session: job for job in reversed(self.jobs) if job.work is Work.GENERATE}
        roomy = self.free >= sum(job.next_slots() for job in prompts.values())
        parties = frozenset(job.owner.party for job in self.jobs)
        plan = self.scheduler.plan(running=running, slots=lambda _: self.free, parties=lambda: parties)
        if plan.empty:
            assert not wanted
            return None
        training = bool(plan.trains or plan.steps)
        served = self._train(plan) if training else self._infer(plan)
        tokens = sum(map(sum, served.values())) + (0 if training else running)
        seconds = training_seconds(tokens) if training else inference_seconds(tokens)
        step = Step(training, self.now, seconds, running, roomy, served, wanted, self.wants())
        self.steps.append(step)
        self.now += seconds
        self.scheduler.account(training=training, seconds=seconds)
        return step

    def run(self, steps: int, *floods: Flood) -> list[Step]:
        """Runs so many steps, with floods, and returns them."""
        first = len(self.steps)
        for _ in range(steps):
            for flood in floods:
                flood.refill(self)
            self.step()
        return self.steps[first:]

    def _train(self, plan: Plan) -> dict[Owner, list[int]]:
        served: dict[Owner, list[int]] = defaultdict(list)
        adapters = Counter(job.adapter for job in (*plan.trains, *plan.steps))
        assert adapters.most_common(1)[0][1] == 1
        for job in (*plan.steps, *plan.trains):
            assert job is next(j for j in self.jobs if j.work is Work.TRAIN and j.adapter == job.adapter)
            served[Work.TRAIN, job.session].append(job.costs[job.take()])
            if job.place == len(job.costs):
                self.scheduler.trains.remove(job.adapter, job)
                self._finish(job)
        return served

    def _infer(self, plan: Plan) -> dict[Owner, list[int]]:
        served: dict[Owner, list[int]] = defaultdict(list)
        for job, index in plan.scores:
            served[job.work, job.session].append(job.costs[index])
            if index == len(job.costs) - 1:
                self._finish(job)
        assert plan.decode == bool(self.running)
        decoding = list(self.running)
        for job in plan.prompts:
            served[job.work, job.session].append(job.next_cost())
            self._prefill(job)
        for left in decoding:
            left[0] -= 1
        self.running = [left for left in self.running if left[0]]
        return served

    def _prefill(self, job: Job) -> None:
        if not job.part:
            job.begun = min(job.completions, self.free)  # the others are let go: a job is done when all have begun
            assert job.begun, "a prompt was planned that has no place"
        job.part += job.next_cost()
        if job.part == job.costs[job.place]:
            self.running += [[job.new_tokens] for _ in range(job.begun)]
            job.place, job.part, job.begun = job.place + 1, 0, 0
            if job.place == len(job.costs):
                self._finish(job)
        self.scheduler.keep_prompts(job)

    def _finish(self, job: Job) -> None:
        job.finished = True
        self.jobs.remove(job)


def stuck(job: Job) -> bool:
    """Whether a job's next prompt needs a slot."""
    return job.work is Work.GENERATE and not job.part
