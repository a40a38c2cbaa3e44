"""What the scheduler's docstring promises holds on a simulated device, for random workloads and endless floods."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.simulated import (
    INFERENCE,
    STEP_TOKENS,
    TRAIN_TOKENS,
    Device,
    Flood,
    Job,
    Owner,
    Step,
    inference_seconds,
    training_seconds,
)

from onebase.server.jobs import Work
from onebase.server.scheduler import Scheduler
from onebase.server.turns import FairQueue
from onebase.server.turns import Owner as Whose

SHARE = STEP_TOKENS // 8  # what prompts and bulk rows may have beside interactive rows
LEAST, MOST = 5, 250  # tokens of a row, a prompt or a micro-batch
LONGEST = max(inference_seconds(12 + MOST), training_seconds(MOST))
REST = (Work.GENERATE, Work.SCORE)
KINDS = (*INFERENCE, Work.TRAIN)


@dataclass
class Workload:
    slots: int
    floods: list[Flood]
    jobs: list[tuple[float, Job]]
    """What is to be finished in time, and when it comes."""

    @property
    def sessions(self) -> dict[Work, int]:
        """How many sessions ever want each kind of work."""
        owners = {(f.work, f.session) for f in self.floods} | {(j.work, j.session) for _, j in self.jobs}
        return {kind: sum(work is kind for work, _ in owners) for kind in KINDS}


costs = st.lists(st.one_of(st.integers(LEAST, 60), st.integers(LEAST, MOST)), min_size=1, max_size=3)
moments = st.floats(0, 6)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    floods, jobs = [], []
    for number, work in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=6))):
        adapters = tuple(range(10 * number, 10 * number + draw(st.integers(1, 2))))
        deep, begins, n = draw(st.booleans()), draw(st.just(0.0) | moments), draw(st.integers(1, 3))
        ends = draw(st.just(float("inf")) | moments)
        floods.append(Flood(work, f"flood {number}", draw(costs), deep, n, begins, ends, adapters))
    for number, work in enumerate(draw(st.lists(st.sampled_from(KINDS), max_size=4))):
        steps = [0] if work is Work.TRAIN else []
        session = draw(st.sampled_from([f"quiet {number}", "quiet"]))
        jobs.append((draw(moments), Job(work, session, draw(costs) + steps, adapter=1000 + number)))
    for number, moment in enumerate(draw(st.lists(moments, max_size=4))):
        jobs.append((moment, Job(Work.INTERACTIVE, f"person {number}", [draw(st.integers(LEAST, 60))])))
    return Workload(draw(st.sampled_from([3, 12])), floods, jobs)


def longest_wait(device: Device, job: Job, sessions: dict[Work, int]) -> float:
    """Seconds within which a job that was just submitted is done, whatever comes later."""
    own = device.backlog((job.work, job.session))
    tokens = own + (sessions[job.work] - 1) * (own + 3 * MOST)  # what its kind is served before
    mine = [other for other in device.jobs if (other.work, other.session) == (job.work, job.session)]
    turns = sum(len(other.costs) for other in mine)
    asking = sessions[Work.INTERACTIVE]
    if job.work is Work.TRAIN:
        steps = 2 * tokens / TRAIN_TOKENS + turns + 2
        return steps * (3 + 2 + 2 * asking) * LONGEST
    if job.work is Work.INTERACTIVE:
        return 3 * (tokens / LEAST + 1) * LONGEST
    if job.work is Work.SCORE:
        steps = (2 * tokens / SHARE + 2) * (2 * (3 + asking) + 2)
    else:
        steps = (tokens / LEAST + turns) * (2 * (3 + asking) + 2 + job.new_tokens)
    return (2 * steps + 4) * LONGEST


def play(workload: Workload) -> list[Step]:
    """Runs a workload; every job is done in time, and the first row of somebody new goes at once."""
    device, sessions = Device(workload.slots), workload.sessions
    coming, due, known = sorted(workload.jobs, key=lambda pair: pair[0]), [], set[str]()
    for _ in range(100_000):
        while coming and coming[0][0] <= device.now:
            job = coming.pop(0)[1]
            device.submit(job)
            due.append((device.now + longest_wait(device, job, sessions), job))
        for flood in workload.floods:
            flood.refill(device)
        interactive = [job for job in device.jobs if job.work is Work.INTERACTIVE]
        heads = {job.session: job.next_cost() for job in reversed(interactive)}
        step = device.step()
        if step is None and coming:
            device.now = coming[0][0]
        elif step is not None:
            check_newcomers(step, heads, set(heads) - known)
            known.update(heads)
        due = [(limit, job) for limit, job in due if not job.finished]
        assert all(limit >= device.now for limit, _ in due)
        if not coming and not due and (step is None or len(device.steps) > 80):
            break
    else:
        pytest.fail("this never ends")
    return device.steps


def check_newcomers(step: Step, heads: dict[str, int], newcomers: set[str]) -> None:
    """Their rows are in the step, unless one row of each other session leaves no room."""
    rows = {session: costs for (work, session), costs in step.served.items() if work is Work.INTERACTIVE}
    if newcomers - set(rows):
        assert not step.training
        assert all(len(costs) == 1 for costs in rows.values())
        next_row = max(cost for session, cost in heads.items() if session not in rows)
        assert step.tokens(Work.INTERACTIVE) + next_row > STEP_TOKENS - step.running


def check_size(steps: list[Step]) -> None:
    big = -10
    for number, step in enumerate(step for step in steps if not step.training):
        tokens = step.tokens(*INFERENCE)
        assert tokens + step.running <= STEP_TOKENS or step.turns(*INFERENCE) == 1
        if step.wants(Work.INTERACTIVE) and step.tokens(*REST) > SHARE:
            assert step.turns(*REST) == 1
            assert number - big > 3, "a long row goes ahead of interactive ones only after it was kept out of 3 steps"
            big = number
    for step in steps:
        assert not step.training or step.tokens(Work.TRAIN) <= TRAIN_TOKENS or step.turns(Work.TRAIN) == 1


def check_interactive(steps: list[Step]) -> None:
    for three in zip(steps, steps[1:], steps[2:], strict=False):
        if all(step.wants(Work.INTERACTIVE) for step in three):
            assert any(step.turns(Work.INTERACTIVE) for step in three)


def check_rest(steps: list[Step], asking: int) -> None:
    """Prompts and bulk rows are kept out of so many steps at most, by interactive rows and by each other's turns."""
    for kind in REST:
        kept_out = 0
        for step in (step for step in steps if not step.training):
            kept_out = 0 if step.turns(kind) or not step.wants(kind) else kept_out + 1
            assert kept_out <= (2 * (3 + asking) + 1 if asking else 1)


def check_training(steps: list[Step], asking: int) -> None:
    """It goes in time while it waits: its share, what interactive work may go ahead, and a step more of each."""
    last = waited = longest = 0.0
    for step in steps:
        if step.training:
            last, waited, longest = step.seconds, 0.0, 0.0
        elif step.wants(Work.TRAIN):
            waited, longest = waited + step.seconds, max(longest, step.seconds)
            assert waited <= 2 * last + (2 + 2 * asking) * longest + 1e-9
        else:
            waited = longest = 0.0


def check_sides(steps: list[Step]) -> None:
    """While both have work that is not interactive, neither gets more time than the other by more than a step each."""
    longest = [max((s.seconds for s in steps if s.training is side), default=0.0) for side in (True, False)]
    for run in runs(steps, lambda s: s.wants(Work.TRAIN) and s.wants(*REST) and not s.wants(Work.INTERACTIVE)):
        ahead = [0.0, *itertools.accumulate(step.seconds if step.training else -step.seconds for step in run)]
        assert max(ahead) - min(ahead) <= sum(longest) + 1e-9


def check_sessions(steps: list[Step]) -> None:
    """Sessions of one kind that both want something throughout are served the same, but for a few turns."""
    owners = sorted({owner for step in steps for owner in step.wanted}, key=str)
    for one, other in itertools.permutations(owners, 2):
        if one[0] is other[0]:
            check_pair([step for step in steps if step.training == (one[0] is Work.TRAIN)], one, other)


def check_pair(steps: list[Step], one: Owner, other: Owner) -> None:
    kind = one[0]
    costs = [costs for step in steps for (work, _), costs in step.served.items() if work is kind]
    largest = max(itertools.chain([0], *costs))

    def compete(step: Step) -> bool:
        return {one, other} <= step.wanted & step.wanting and (step.roomy or kind is not Work.GENERATE)

    for run in runs(steps, compete):
        mine = [sum(step.served.get(one, [])) for step in run]
        others = [sum(step.served.get(other, [])) for step in run]
        alone = [0 if other in step.served else tokens for step, tokens in zip(run, mine, strict=True)]
        assert greatest_gain(alone, others) <= 3 * largest
        if kind in (Work.INTERACTIVE, Work.SCORE):
            assert greatest_gain(mine, others) <= 2 * largest


def greatest_gain(one: list[int], other: list[int]) -> int:
    """By how much one gains on the other from any moment to any later one."""
    gain = best = 0
    for a, b in zip(one, other, strict=True):
        gain = max(0, gain + a - b)
        best = max(best, gain)
    return best


def runs(steps: Iterable[Step], holds: Callable[[Step], bool]) -> Iterator[list[Step]]:
    """Longest runs of steps for which something holds."""
    for fine, run in itertools.groupby(steps, holds):
        if fine:
            yield list(run)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads())
def test_the_bounds_hold_for_every_workload(workload: Workload) -> None:
    check(play(workload), workload.sessions[Work.INTERACTIVE])


def check(steps: list[Step], asking: int) -> None:
    """All bounds, with so many sessions that have interactive rows."""
    check_size(steps)
    check_interactive(steps)
    check_rest(steps, asking)
    check_training(steps, asking)
    check_sides(steps)
    check_sessions(steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [None, *KINDS])
def test_a_session_alone_has_the_whole_device(kind: Work, before: Work | None) -> None:
    device = Device()
    if before is not None:
        device.run(40, Flood(kind, "alone", [40]), Flood(before, "gone", [40], adapters=(1,)))
        while device.backlog((before, "gone")) or (device.running and kind is not Work.GENERATE):
            device.step()
    for step in device.run(20, Flood(kind, "alone", [40])):
        most = 1 if kind is Work.TRAIN else (STEP_TOKENS - step.running) // 40
        assert step.turns(kind) == min(most, device.slots - step.running)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(), st.lists(st.sampled_from(["red", "blue", "green"]), min_size=6, max_size=6))
def test_the_bounds_hold_for_tenants_as_for_sessions(workload: Workload, tenants: list[str]) -> None:
    """Each bound with tenants in the place of sessions; inside a tenant its sessions are served alike."""
    floods = [replace(flood, tenant=tenant) for flood, tenant in zip(workload.floods, tenants, strict=False)]
    steps = Device(workload.slots).run(80, *floods)
    tenant_of = {flood.session: flood.tenant for flood in floods}
    check(of_tenants(steps, tenant_of), len({f.tenant for f in floods if f.work is Work.INTERACTIVE}))
    for tenant in set(tenants):
        mine = [flood.session for flood in floods if flood.tenant == tenant]
        check_sessions([of_sessions(step, mine) for step in steps])


def of_tenants(steps: list[Step], tenant_of: dict[str, str]) -> list[Step]:
    """The same steps, with what each tenant's sessions wanted and were served."""

    def tenants(owners: Iterable[Owner]) -> set[Owner]:
        return {(work, tenant_of[session]) for work, session in owners}

    found = []
    for step in steps:
        served: dict[Owner, list[int]] = {owner: [] for owner in tenants(step.served)}
        for (work, session), costs_ in step.served.items():
            served[work, tenant_of[session]] += costs_
        found.append(replace(step, served=served, wanted=tenants(step.wanted), wanting=tenants(step.wanting)))
    return found


def of_sessions(step: Step, sessions: list[str]) -> Step:
    """The same step, with what these sessions wanted and were served."""
    return replace(
        step,
        served={owner: costs_ for owner, costs_ in step.served.items() if owner[1] in sessions},
        wanted={owner for owner in step.wanted if owner[1] in sessions},
        wanting={owner for owner in step.wanting if owner[1] in sessions},
    )


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tenant_with_a_hundred_sessions_gets_no_more_than_one_with_one(kind: Work, deep: bool) -> None:
    many = [Flood(kind, f"many {i}", [30], deep, adapters=(i,), tenant="many") for i in range(100)]
    one = Flood(kind, "one", [30], adapters=tuple(range(100, 104)), tenant="one")
    steps = Device(slots=6).run(150, *many, one)
    turns = Counter(session.split()[0] for step in steps for (_, session), costs in step.served.items() for _ in costs)
    assert abs(turns["many"] - turns["one"]) <= 4


def test_many_sessions_with_questions_keep_another_tenants_training_waiting_no_longer_than_one_does() -> None:
    def longest_wait_of_training(sessions: int) -> float:
        asking = [Flood(Work.INTERACTIVE, f"ask {i}", [30], tenant="asking") for i in range(sessions)]
        steps = Device().run(150, *asking, Flood(Work.TRAIN, "train", [60], tenant="training"))
        ends = list(itertools.accumulate(step.seconds for step in steps))
        trained = [end for end, step in zip(ends, steps, strict=True) if step.training]
        return max(later - earlier for earlier, later in itertools.pairwise(trained))

    assert longest_wait_of_training(100) <= longest_wait_of_training(1) + 1e-9


def test_a_flood_of_questions_keeps_the_training_of_others_waiting_for_its_own_share_alone() -> None:
    def longest_wait_of_training(tenants: int) -> float:
        """In training steps."""
        training = [Flood(Work.TRAIN, f"train {i}", [60], adapters=(i,), tenant=f"tenant {i}") for i in range(tenants)]
        steps = Device().run(300, Flood(Work.INTERACTIVE, "ask", [30], deep=False, tenant="asking"), *training)
        ends = list(itertools.accumulate(step.seconds for step in steps))
        trained = [(end, step.seconds) for end, step in zip(ends, steps, strict=True) if step.training]
        return max((later - step - earlier) / step for (earlier, _), (later, step) in itertools.pairwise(trained))

    assert 5 / 4 < longest_wait_of_training(1) <= 1 + 1 / 2 + 2  # as long again, its share, and steps under way
    assert longest_wait_of_training(7) <= 1 + 1 / 8 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_refused_pays_with_turns_and_no_longer_than_that(kind: Work) -> None:
    """A flood that is refused a hundred times in a second of the device gets a little while others have work."""
    device = Device(slots=6)
    flood = Flood(kind, "flood", [30], adapters=(0, 1, 2), tenant="flood")
    others = [Flood(kind, f"other {i}", [30], deep=False, adapters=(10 + i,), tenant=f"other {i}") for i in range(3)]

    def turns(steps: list[Step], session: str) -> int:
        return sum(len(costs_) for step in steps for (_, who), costs_ in step.served.items() if who == session)

    device.run(50, flood, *others)
    before_it = device.run(200, flood, *others)
    assert turns(before_it, "flood") >= turns(before_it, "other 0")
    steps = []
    for _ in range(200):
        before = device.now
        steps += device.run(1, flood, *others)
        device.scheduler.refused(Whose("flood", "flood"), round(100 * (device.now - before)) + 2)
    assert 3 < turns(steps, "flood") <= turns(before_it, "flood") / 2
    assert turns(steps, "other 0") >= 0.9 * turns(before_it, "other 0")
    device.run(60, flood, *others)  # it floods no more
    after_it = device.run(200, flood, *others)
    assert turns(after_it, "flood") >= turns(after_it, "other 0")


@pytest.mark.parametrize("beside", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", [SHARE - 5, SHARE + 5])
def test_who_is_refused_without_end_gets_a_little_beside_everything(kind: Work, beside: Work, cost: int) -> None:
    device = Device(slots=6)
    flood = Flood(kind, "flood", [cost], adapters=(0,), tenant="flood")
    other = Flood(beside, "other", [60], completions=1, adapters=(9,), tenant="other")
    without = longest = 0
    for _ in range(400):
        (step,) = device.run(1, flood, other)
        device.scheduler.refused(Whose("flood", "flood"), 200)
        without = 0 if (kind, "flood") in step.served else without + 1
        longest = max(longest, without)
    # Seven steps, and one of each side whose turn it is just then; a long row waits until it was kept out of 3 such.
    long = cost > SHARE and beside is Work.INTERACTIVE and kind in REST
    assert longest <= (7 + 2) * (1 + 3 * long)


def test_who_is_refused_has_the_device_where_nobody_else_wants_it() -> None:
    device = Device()
    device.scheduler.refused(Whose("flood", "flood"), 1000)
    for step in device.run(40, Flood(Work.SCORE, "flood", [40], tenant="flood")):
        assert step.turns(Work.SCORE) == STEP_TOKENS // 40


def test_under_floods_of_everything_everything_has_its_share() -> None:
    names = [(kind, f"flood {i}", i) for kind in KINDS for i in range(3)]
    floods = [Flood(kind, name, [30, 60], completions=2, adapters=(i,)) for kind, name, i in names]
    steps = Device().run(3000, *floods)
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens(*INFERENCE) for step in steps)
    assert 1 / 4 < sum(step.seconds for step in steps if step.training) / seconds < 1 / 2
    assert 0.8 < sum(step.tokens(Work.INTERACTIVE) for step in steps) / tokens < 0.95
    assert all(sum(step.tokens(kind) for step in steps) / tokens > 0.02 for kind in REST)


def test_adapters_of_one_session_share_its_turns() -> None:
    many = Flood(Work.TRAIN, "many", [50], adapters=tuple(range(5)))
    one = Flood(Work.TRAIN, "one", [50], adapters=(9,))
    steps = Device().run(100, many, one)
    turns = Counter(session for step in steps for (_, session), costs in step.served.items() for _ in costs)
    assert abs(turns["many"] - turns["one"]) <= 2


def test_sessions_with_many_completions_get_slots_by_turns() -> None:
    floods = [Flood(Work.GENERATE, session, [20], completions=4) for session in "ab"]
    steps = Device(slots=4).run(100, *floods)
    begun = [session for step in steps for _, session in step.served]
    assert begun[:8] in (list("abababab"), list("babababa"))


HARD = {
    "small rows beside large ones": [(Work.SCORE, [150])] * 5 + [(Work.SCORE, [10])],
    "small questions beside large ones": [(Work.INTERACTIVE, [150])] * 5 + [(Work.INTERACTIVE, [10])],
    "small prompts beside large ones": [(Work.GENERATE, [150])] * 8 + [(Work.GENERATE, [30])],
    "small passes beside large ones": [(Work.TRAIN, [100])] * 8 + [(Work.TRAIN, [20])],
    "sometimes large prompts": [(Work.GENERATE, [24, 199]), (Work.GENERATE, [21])],
    "sometimes large passes": [(Work.TRAIN, [24, 119]), (Work.TRAIN, [21])],
    "prompts that fill steps": [
        (Work.GENERATE, [187]),
        (Work.TRAIN, [5]),
        (Work.TRAIN, [9]),
        (Work.INTERACTIVE, [14]),
    ],
}


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", HARD)
def test_the_bounds_hold_for_hard_workloads(name: str, deep: bool) -> None:
    floods = [Flood(work, f"flood {i}", costs, deep, adapters=(i,)) for i, (work, costs) in enumerate(HARD[name])]
    steps = Device(slots=40).run(300, *floods)
    check(steps, sum(flood.work is Work.INTERACTIVE for flood in floods))


def test_leftovers_of_interactive_steps_are_no_substitute_for_a_share() -> None:
    steps = Device().run(100, Flood(Work.INTERACTIVE, "a", [195]), Flood(Work.SCORE, "b", [5]))
    assert sum(step.tokens(Work.SCORE) for step in steps) >= 100 / 5 * SHARE


def test_steps_are_full_whoever_goes_first() -> None:
    steps = Device().run(100, Flood(Work.INTERACTIVE, "a", [30]), Flood(Work.SCORE, "b", [40]))
    assert all(step.tokens(*INFERENCE) > STEP_TOKENS - 40 for step in steps)


def test_of_those_who_are_level_who_waited_longest_is_first_and_barred_ones_last() -> None:
    queue: FairQueue[str] = FairQueue()
    for owner in "abc":
        queue.push(owner, "task")
    queue.charge("a", 1)
    for _ in range(2):
        queue.charge("c", 100)  # the others could not go, and gain nothing by that
    assert queue.owners() == ["b", "a", "c"]
    assert queue.owners(frozenset("b")) == ["a"]
    assert queue.owners(frozenset("ab")) == []


def test_a_long_prompt_is_not_passed_by_short_ones_for_ever() -> None:
    """The cache holds four short completions or one long one."""
    scheduler, running = Scheduler(STEP_TOKENS), list[list[int]]()  # length and steps to go

    def slots(length: int) -> int:
        return max(0, 400 // max([length, *(length for length, _ in running)]) - len(running))

    long = Job(Work.GENERATE, "long", [350])
    for step in range(30):
        if step == 10:
            scheduler.prompts.push(long.owner, long)
        short = Job(Work.GENERATE, "short", [100])
        scheduler.prompts.push(short.owner, short)
        plan = scheduler.plan(running=len(running), slots=slots)
        if long in plan.prompts:
            return
        running = [[length, left - 1] for length, left in running if left > 1]
        running += [[100, 3] for _ in plan.prompts]
        for job in plan.prompts:
            scheduler.prompts.remove(job.owner, job)
    pytest.fail("the long prompt never began")
