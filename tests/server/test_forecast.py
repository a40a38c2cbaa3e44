"""What refusals say of waiting, on a simulated clock: whoever comes again exactly then is let in nine times of ten."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import deque

import pytest
from server.harness import Clock

from onebase.server.forecast import LONGEST, SHORTEST, Forecast

TAKES = {
    "equally long": lambda r: 2.0,
    "about as long": lambda r: r.uniform(1.0, 3.0),
    "by chance": lambda r: r.expovariate(0.5),
    "short and long": lambda r: r.choice((0.4, 0.4, 0.4, 6.0)),
}


class World:
    """A limit, work that begins and ends, and clients who do as they are told."""

    def __init__(self, limit, takes, seed):
        self.clock = Clock()
        self.forecast = Forecast(self.clock)
        self.limit, self.takes, self.random = limit, takes, random.Random(seed)
        self.under_way = 0
        self.events, self.order = [], itertools.count()
        self.came_back = self.let_in = 0
        self.hints = []

    def at(self, seconds, act, *arguments):
        heapq.heappush(self.events, (self.clock.now + seconds, next(self.order), act, arguments))

    def run(self, seconds):
        until = self.clock.now + seconds
        while self.events and self.events[0][0] <= until:
            self.clock.now, _, act, arguments = heapq.heappop(self.events)
            act(*arguments)

    def ask(self, told, then=None):
        """Asks for room; `told` says whether it was told to come now."""
        fits = self.under_way < self.limit
        if told and self.clock.now > 1060:  # the first have no past to learn from
            self.came_back += 1
            self.let_in += fits
        if fits:
            self.under_way += 1
            self.at(self.takes(self.random), self.done, self.forecast.begin(), then)
        else:
            wait = self.forecast.wait()
            self.hints.append(wait)
            self.at(wait, self.ask, True, then)

    def done(self, number, then):
        self.under_way -= 1
        self.forecast.end(number)
        if then is not None:
            then()


@pytest.mark.parametrize("limit", [32])
@pytest.mark.parametrize("takes", TAKES)
def test_with_steady_arrivals_nine_of_ten_are_let_in_when_they_come_again(limit, takes):
    """At half of what the limit can do; nearer to all of it no wait is long enough, for the room is rarely there."""
    load, world = 0.5, World(limit, TAKES[takes], seed=limit)
    mean = sum(TAKES[takes](random.Random(one)) for one in range(2000)) / 2000

    def arrive():
        # Now and then many at once, or a lightly loaded limit would never be reached.
        for _ in range(1 if world.random.random() < 0.98 else limit // 2):
            world.ask(False)
        world.at(world.random.expovariate(load * limit / mean / (0.98 + 0.02 * (limit // 2))), arrive)

    world.at(0, arrive)
    world.run(800)
    assert world.came_back > 5
    assert world.let_in / world.came_back >= 0.9


@pytest.mark.parametrize("limit", [4, 16, 64])
@pytest.mark.parametrize("takes", TAKES)
def test_of_a_crowd_nine_of_ten_are_let_in_when_they_come_again(limit, takes):
    """As many again as there is room for come at once, each second minute, and each waits as it is told."""
    world = World(limit, TAKES[takes], seed=limit)

    def crowd():
        for number in range(2 * limit):
            world.at(number * 0.2 / limit, world.ask, False)
        world.at(120, crowd)

    world.at(0, crowd)
    world.run(1500)
    assert world.came_back > 15
    assert world.let_in / world.came_back >= 0.9


@pytest.mark.parametrize("limit", [4, 16, 64])
@pytest.mark.parametrize("takes", TAKES)
def test_a_hint_is_never_more_than_a_few_times_too_long(limit, takes):
    """Compared with when there really is room in nine cases of ten if nobody else comes, which it must reckon with."""
    hints, rooms = [], []
    for seed in range(40):
        world = World(limit, TAKES[takes], seed)
        for _ in range(50):  # a past to learn from
            number = world.forecast.begin()
            world.clock.pass_(world.takes(world.random))
            world.forecast.end(number)
        for _ in range(limit):
            world.at(world.random.uniform(0, 0.3), world.ask, False)
        world.run(0.3)
        ends = sorted(at for at, _, act, _ in world.events if act == world.done)
        if world.under_way == limit:
            hints.append(world.forecast.wait())
            rooms.append(max(SHORTEST, ends[0] - world.clock.now))
    if len(hints) >= 8:  # of very many short ones, one has always ended already
        assert sorted(hints)[len(hints) // 2] < 6 * sorted(rooms)[int(len(rooms) * 0.9)]


def test_it_is_bounded_and_knows_no_past():
    forecast = Forecast(clock := Clock())
    assert forecast.wait() == SHORTEST
    number = forecast.begin()
    assert 0.5 < forecast.wait() <= 2
    clock.pass_(500)
    forecast.end(number)
    forecast.begin()
    assert forecast.wait() == LONGEST


def test_work_that_always_takes_as_long_ends_when_it_will():
    forecast = Forecast(clock := Clock())
    for _ in range(5):
        number = forecast.begin()
        clock.pass_(3)
        forecast.end(number)
    forecast.begin()
    clock.pass_(1)
    forecast.begin()
    assert 2.0 <= forecast.wait() <= 3.01  # the first ends in two seconds, the other in three
    assert forecast.wait() == pytest.approx(3.0, abs=0.01)  # and one who was told so before is ahead


def test_who_does_not_wait_does_not_put_the_others_off_for_ever():
    forecast = Forecast(clock := Clock())
    for _ in range(8):
        forecast.begin()
    clock.pass_(0.5)
    hints = [forecast.wait() for _ in range(5000)]
    assert max(hints) < 5


def test_it_takes_little_time_whatever_is_under_way():
    forecast = Forecast()
    for _ in range(2000):
        forecast.end(forecast.begin())
    for _ in range(1024):
        forecast.begin(3)
    began = time.process_time()
    for _ in range(100):
        forecast.wait(5)
    assert (time.process_time() - began) / 100 < 0.02


def test_who_was_told_to_come_and_never_does_is_waited_for_no_longer():
    forecast = Forecast(clock := Clock())
    running = deque()

    def steady(times):
        """Sixteen pieces of work under way, each of which takes ten seconds."""
        for _ in range(times):
            began, number = running.popleft()
            clock.now = max(clock.now, began + 10)
            forecast.end(number)
            running.append((clock.now, forecast.begin()))

    for _ in range(16):
        running.append((clock.now, forecast.begin()))
        clock.pass_(10 / 16)
    steady(600)
    before = forecast.wait()
    steady(20)
    for _ in range(5000):
        forecast.wait()
        clock.pass_(1e-4)
    steady(16 * 30)
    assert len(forecast._told) < 20
    assert forecast.wait() <= before + 0.5
