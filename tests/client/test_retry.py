import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.client.errors import (
    ERRORS,
    CancelledError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from onebase.client.retry import Backoff, Pauses

DRAWS = st.floats(0, 1, exclude_max=True)
NEVER = sorted(set(ERRORS.values()) - {UnavailableError, ResourceExhaustedError}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", NEVER)
def test_other_failures_are_never_retried(kind):
    assert Backoff().delay(kind("no", retry_after=0.1), attempt=0, remaining=600, draw=0.5) is None


def test_a_full_queue_is_retried_only_if_the_server_says_when():
    backoff = Backoff()

    assert backoff.delay(ResourceExhaustedError("too large"), 0, 600, 0.5) is None
    assert backoff.delay(ResourceExhaustedError("full", retry_after=0.0), 0, 600, 0.5) is not None


def test_delays_grow_by_the_factor_up_to_the_longest():
    backoff = Backoff(first=1.0, factor=2.0, longest=6.0)

    delays = [backoff.delay(UnavailableError("down"), attempt, math.inf, 0.999999) for attempt in range(5)]

    assert delays == pytest.approx([1, 2, 4, 6, 6], rel=1e-5)


def test_jitter_spreads_over_half_of_the_delay():
    backoff = Backoff(first=1.0)

    assert backoff.delay(UnavailableError("down"), 0, 600, 0.0) == 0.5
    assert backoff.delay(UnavailableError("down"), 0, 600, 0.5) == 0.75


@given(attempt=st.integers(0, 10_000), remaining=st.floats(0, 1000), draw=DRAWS, asked=st.none() | st.floats(0, 100))
def test_a_delay_keeps_to_the_deadline_and_to_what_the_server_asks(attempt, remaining, draw, asked):
    delay = Backoff().delay(UnavailableError("down", retry_after=asked), attempt, remaining, draw)

    if delay is None:
        assert remaining - (asked or 0) < Backoff().first
    else:
        assert (asked or 0) < delay < remaining


def test_no_retry_is_planned_beyond_the_deadline():
    assert Backoff().delay(UnavailableError("down", retry_after=10.0), 0, 9.0, 0.5) is None


def test_a_stream_that_keeps_breaking_is_opened_ever_more_seldom_until_it_speaks():
    pauses = Pauses(Backoff(first=1, factor=2, longest=100), longest=5)

    assert [pauses.after(UnavailableError("x"), 1) for _ in range(4)] == [1, 2, 4, 5]
    pauses.heard()
    assert pauses.after(CancelledError("x"), 0) == 0.5
    assert pauses.after(UnavailableError("x", retry_after=2), 1) == 4
    assert pauses.after(UnauthenticatedError("x"), 0) == 5
