"""Ratios and peaks, with a clock that only the work moves."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
from measure import Effort, exactly, over, pairs, peak_bytes, quartiles, timed

PATIENT = 1e9


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        """Something that takes the next of these seconds each time."""

        def work() -> None:
            self.order.append(name)
            self.now += next(seconds)

        return work


def test_a_ratio_is_that_of_the_medians_and_its_quartiles_those_of_the_pairs() -> None:
    found = over([2.0, 4.0, 100.0], [1.0, 1.0, 2.0])
    assert found.value == 4.0
    assert (found.low, found.high) == quartiles([2.0, 4.0, 50.0]) == (3.0, 27.0)
    assert found.pairs == 3


@pytest.mark.parametrize(("numerators", "denominators"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_makes_no_pairs_is_refused(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(ValueError, match="make no pairs"):
        over(numerators, denominators)


def test_one_pair_is_its_own_quartiles() -> None:
    assert quartiles([0.5]) == (0.5, 0.5)
    assert exactly(0.0, 7).low == exactly(0.0, 7).high == 0.0


def test_both_sides_take_turns_and_the_first_runs_do_not_count() -> None:
    clock = Clock()
    first = clock.worker("first", iter([50.0, 2.0, 2.0, 2.0, 2.0]))
    second = clock.worker("second", iter([70.0, 1.0, 1.0, 1.0, 1.0]))
    found = pairs(first, second, Effort(pairs=4, seconds=PATIENT), clock)
    assert clock.order == ["first", "second"] * 5
    assert (found.value, found.low, found.high, found.pairs) == (2.0, 2.0, 2.0, 4)
    assert found.detail == {"first_seconds": 2.0, "second_seconds": 1.0}


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 2), (0.15, 3)])
def test_slow_work_gets_three_pairs_and_very_slow_work_two(seconds: float, count: int) -> None:
    def work() -> None:
        time.sleep(0.05)

    assert pairs(work, work, Effort(pairs=8, seconds=seconds), time.perf_counter).pairs == count


def test_fewer_pairs_than_three_may_be_asked_for() -> None:
    clock = Clock()
    first, second = clock.worker("first", iter([1.0] * 9)), clock.worker("second", iter([1.0] * 9))
    assert pairs(first, second, Effort(pairs=1, seconds=PATIENT), clock).pairs == 1


def test_the_collector_waits_while_something_is_timed_and_goes_on_after_a_failure() -> None:
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timed(fail)
    assert seen == [False]
    assert gc.isenabled()


def test_a_peak_counts_what_is_held_at_once_and_not_what_was_there_before() -> None:
    size = 64 * 2**20
    held = bytearray(size)

    def twice() -> None:
        for _ in range(2):
            bytearray(b"x") * size

    assert 0.9 * size < peak_bytes(twice) < 1.5 * size
    assert len(held) == size
