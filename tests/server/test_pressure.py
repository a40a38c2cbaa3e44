from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from onebase.server.pressure import LEAST_TOKENS, Pressure, Throttle

EVENTS = st.lists(st.one_of(st.none(), st.integers(1, 10_000)), max_size=200)


@given(st.integers(1, 5000), st.integers(1, 100), EVENTS)
def test_a_limit_stays_within_its_bounds_halves_and_grows_back(most, least, events):
    throttle = Throttle(most, least)
    for reached in events:
        before = throttle.now
        if reached is None:
            throttle.grow()
            assert before <= throttle.now <= before + most / 256 + 1
        else:
            throttle.shrink(reached)
            assert throttle.now <= max(min(least, most), min(before, reached) / 2)
        assert min(least, most) <= throttle.now <= most
    for _ in range(256):
        throttle.grow()
    assert throttle.now == most


@given(st.integers(0, 4000))
def test_a_device_of_any_size_fails_seldom_once_it_is_known(capacity):
    throttle, failures = Throttle(4096, LEAST_TOKENS), 0
    for step in range(1000):
        if throttle.now > max(capacity, LEAST_TOKENS):
            failures += step >= 20
            throttle.shrink(throttle.now)
        else:
            throttle.grow()
    assert failures <= 1000 * (4096 / 256) / max(capacity / 2, LEAST_TOKENS) + 1


def test_each_limit_learns_from_its_own_steps():
    tokens, slots = SimpleNamespace(step_tokens=1024, train_tokens=256), SimpleNamespace(allowed=8)
    pressure = Pressure(tokens, slots)
    pressure.learn(training=False, too_many=800)
    assert (tokens.step_tokens, tokens.train_tokens, slots.allowed) == (400, 256, 8)
    pressure.learn(training=True, too_many=200)
    assert (tokens.step_tokens, tokens.train_tokens, slots.allowed) == (400, 100, 8)
    slots.allowed = 3  # memory ran out in the cache
    for _ in range(32):
        pressure.learn(training=False, too_many=0)
    assert (tokens.step_tokens, tokens.train_tokens, slots.allowed) == (528, 100, 3)
    for _ in range(256):
        pressure.learn(training=False, too_many=0)
        pressure.learn(training=True, too_many=0)
    assert (tokens.step_tokens, tokens.train_tokens, slots.allowed) == (1024, 256, 8)
