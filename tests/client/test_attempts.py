import pytest

from onebase.client.attempts import Attempts
from onebase.client.errors import DeadlineExceededError, InternalError, UnavailableError
from onebase.client.retry import Backoff

BACKOFF = Backoff(first=0.1, factor=2.0, longest=10.0)
AWAY = UnavailableError("away")


def test_delays_grow_with_the_attempts_that_failed():
    attempts = Attempts(BACKOFF, repeatable=True, seconds=1000)

    delays = [attempts.delay_after(AWAY) for _ in range(5)]

    for number, delay in enumerate(delays):
        assert 0.05 * 2**number <= delay <= 0.1 * 2**number


@pytest.mark.parametrize(("repeatable", "failure"), [(False, AWAY), (True, InternalError("a bug"))])
def test_what_may_not_be_repeated_or_cannot_help_is_told_at_once(repeatable, failure):
    attempts = Attempts(BACKOFF, repeatable=repeatable, seconds=1000)

    with pytest.raises(type(failure)) as caught:
        attempts.delay_after(failure)

    assert caught.value is failure


def test_a_deadline_does_not_hide_why_there_was_a_second_attempt():
    attempts = Attempts(BACKOFF, repeatable=True, seconds=1000)
    attempts.delay_after(AWAY)

    with pytest.raises(UnavailableError) as caught:
        attempts.delay_after(DeadlineExceededError("too late"))

    assert caught.value is AWAY


def test_there_is_no_attempt_and_no_negative_time_after_the_deadline():
    attempts = Attempts(BACKOFF, repeatable=True, seconds=0)

    assert attempts.remaining() == 0
    with pytest.raises(UnavailableError):
        attempts.delay_after(AWAY)
