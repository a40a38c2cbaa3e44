"""Plans: everything gets its turn, nothing goes over the budget, order inside an adapter is kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from onebase.server.identity import OPERATOR
from onebase.server.jobs import Work
from onebase.server.scheduler import Scheduler
from onebase.server.turns import FairQueue, Owner

BUDGET = 100


class OfASession:
    """What the operator's session wants."""

    session: str

    @property
    def owner(self) -> Owner:
        return Owner(OPERATOR, self.session)


@dataclass(eq=False)
class Score(OfASession):
    session: str
    work: Work
    rows: list[int]
    planned: int = 0

    def next_cost(self) -> int:
        return self.rows[self.planned] if self.planned < len(self.rows) else 0

    def take(self) -> int:
        self.planned += 1
        return self.planned - 1


@dataclass(eq=False)
class Prompt(OfASession):
    session: str
    cost: int
    work: Work = Work.GENERATE
    under_way = False

    def next_slots(self) -> int:
        return 1

    def next_length(self) -> int:
        return self.cost

    def next_cost(self) -> int:
        return self.cost


@dataclass(eq=False)
class Train(OfASession):
    adapter: int
    rows: list[int]
    session: str = ""
    work: Work = Work.TRAIN

    def next_cost(self) -> int:
        return self.rows[0] if self.rows else 0


def four(_: int) -> int:
    return 4


def simulate(scheduler: Scheduler, steps: int) -> list[tuple[str, int, int]]:
    """Runs plans on a device whose seconds are tokens: ("infer" or "train", tokens, step)."""
    history = []
    for number in range(steps):
        plan = scheduler.plan(running=0, slots=four)
        if plan.empty:
            break
        if plan.trains or plan.steps:
            tokens = 0
            for train in plan.trains:
                assert isinstance(train, Train)
                tokens += train.rows.pop(0)
                if not train.rows:
                    scheduler.trains.remove(train.adapter, train)
            for step in plan.steps:
                scheduler.trains.remove(step.adapter, step)
            assert tokens <= BUDGET or len(plan.trains) == 1
            scheduler.account(training=True, seconds=tokens + 1)
            history.append(("train", tokens, number))
        else:
            tokens = sum(score.rows[i] for score, i in plan.scores if isinstance(score, Score))
            for prompt in plan.prompts:
                tokens += prompt.next_cost()
                scheduler.prompts.remove(prompt.owner, prompt)
            assert tokens <= BUDGET or len(plan.scores) + len(plan.prompts) == 1
            scheduler.account(training=False, seconds=tokens + 1)
            history.append(("infer", tokens, number))
    return history


costs = st.lists(st.integers(1, 150), min_size=1, max_size=6)
works = st.lists(
    st.one_of(
        st.tuples(st.just("score"), st.sampled_from("abc"), costs),
        st.tuples(st.just("interactive"), st.sampled_from("abc"), costs),
        st.tuples(st.just("prompt"), st.sampled_from("abc"), costs),
        st.tuples(st.just("train"), st.sampled_from("123"), costs),
    ),
    max_size=12,
)


@given(works)
def test_everything_is_planned_once_and_the_queues_run_empty(work: list[tuple[str, str, list[int]]]) -> None:
    scheduler, total = Scheduler(BUDGET), 0
    for kind, owner, rows in work:
        if kind == "train":
            scheduler.trains.push(int(owner), Train(int(owner), list(rows)))
            total += sum(rows)
        elif kind == "prompt":
            scheduler.prompts.push(Owner(OPERATOR, owner), Prompt(owner, rows[0]))
            total += rows[0]
        else:
            name = Work.SCORE if kind == "score" else Work.INTERACTIVE
            scheduler.scores[name].push(Owner(OPERATOR, owner), Score(owner, name, list(rows)))
            total += sum(rows)
    history = simulate(scheduler, 1000)
    assert sum(tokens for _, tokens, _ in history) == total
    assert scheduler.plan(running=0, slots=four).empty


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(2, 30))
def test_an_interactive_job_goes_into_the_very_next_step(rows: list[int], crowd: int) -> None:
    scheduler = Scheduler(BUDGET)
    for i in range(crowd):
        scheduler.trains.push(i, Train(i, [90] * 5))
        scheduler.scores[Work.SCORE].push(Owner(OPERATOR, "bulk"), Score("bulk", Work.SCORE, [90] * 50))
        scheduler.prompts.push(Owner(OPERATOR, f"p{i}"), Prompt(f"p{i}", 90))
    simulate(scheduler, 3)
    job = Score("person", Work.INTERACTIVE, rows)
    scheduler.scores[Work.INTERACTIVE].push(job.owner, job)
    plan = scheduler.plan(running=2, slots=four)
    assert next(task for task, _ in plan.scores) is job


def test_training_and_inference_share_the_device_by_time() -> None:
    scheduler = Scheduler(BUDGET)
    for i in range(4):
        scheduler.trains.push(i, Train(i, [50] * 200))
    scheduler.scores[Work.SCORE].push(Owner(OPERATOR, "a"), Score("a", Work.SCORE, [10] * 2000))
    time = Counter[str]()
    for kind, tokens, _ in simulate(scheduler, 150):
        time[kind] += tokens
    assert abs(time["train"] - time["infer"]) <= 2 * BUDGET


def test_a_flood_of_one_session_does_not_hold_up_another() -> None:
    scheduler = Scheduler(BUDGET)
    queue = scheduler.scores[Work.SCORE]
    for _ in range(50):
        queue.push(Owner(OPERATOR, "flood"), Score("flood", Work.SCORE, [40] * 10))
    simulate(scheduler, 20)
    quiet = Score("quiet", Work.SCORE, [40] * 4)
    queue.push(quiet.owner, quiet)
    simulate(scheduler, 6)
    assert quiet.next_cost() == 0


def test_a_newcomer_has_no_credit_for_the_time_it_was_away() -> None:
    queue: FairQueue[Prompt] = FairQueue()
    queue.push("old", Prompt("old", 1))
    for _ in range(100):
        queue.charge("old", 10)
    queue.push("new", Prompt("new", 1))
    for _ in range(2):
        queue.charge("new", 10)
    assert queue.owners()[0] == "old"


def test_an_adapters_passes_and_steps_keep_their_order() -> None:
    scheduler = Scheduler(BUDGET)
    first, step, second = Train(1, [30]), Train(1, []), Train(1, [10])
    for task in (first, step, second):
        scheduler.trains.push(1, task)
    plan = scheduler.plan(running=0, slots=four)
    assert plan.trains == [first]
    assert not plan.steps
    scheduler.trains.remove(1, first)
    assert scheduler.plan(running=0, slots=four).steps == [step]
