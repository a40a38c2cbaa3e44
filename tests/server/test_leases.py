from __future__ import annotations

import logging

import pytest
from server.harness import Clock

from onebase.server.errors import Aborted, NotFound, PermissionDenied, ResourceExhausted
from onebase.server.leases import Sessions


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(clock):
    return Sessions(clock)


def test_ids_are_secrets_of_32_hexadecimal_digits(sessions, caplog):
    caplog.set_level(logging.DEBUG)
    one, two = sessions.open("a", 60), sessions.open("a", 60)
    sessions.take(one, "p1")
    sessions.close(one.session_id)
    assert len(one.session_id) == 32
    int(one.session_id, 16)
    assert one.session_id != two.session_id
    assert one.session_id not in caplog.text
    assert one.session_id not in repr(one)
    assert one.session_id not in one.queue


def test_a_session_ends_when_its_ttl_runs_out_and_not_before(sessions, clock):
    session = sessions.open("a", 60)
    clock.pass_(59.9)
    assert sessions.get(session.session_id) is session  # and is renewed by that
    clock.pass_(59.9)
    assert sessions.live() == [session]
    clock.pass_(0.1)
    assert sessions.live() == []
    with pytest.raises(NotFound) as caught:
        sessions.get(session.session_id)
    assert caught.value.reason == "SESSION_NOT_FOUND"
    assert session.session_id not in caught.value.message


def test_a_request_in_flight_keeps_it_alive_and_its_end_renews_it(sessions, clock):
    session = sessions.open("a", 10)
    with sessions.use(session.session_id) as used:
        assert used is session
        clock.pass_(1000)
        sessions.sweep()
        assert sessions.live() == [session]
        assert sessions.idle(session) == 0
    clock.pass_(9)
    assert sessions.live() == [session]
    clock.pass_(1)
    assert sessions.live() == []


def test_use_counts_every_request_also_one_that_fails(sessions):
    session = sessions.open("a", 10)

    def fail():
        with sessions.use(session.session_id), sessions.use(session.session_id):
            assert session.in_flight == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert session.in_flight == 0


def test_no_session_is_a_use_of_none(sessions):
    with sessions.use("") as session:
        assert session is None


def test_a_lease_is_exclusive_and_says_when_to_come_again(sessions, clock):
    one, two = sessions.open("trainer one", 60), sessions.open("two", 60)
    sessions.take(one, "p1")
    sessions.take(one, "p1")  # again is fine
    clock.pass_(20)
    with pytest.raises(Aborted, match="trainer one") as caught:
        sessions.take(two, "p1")
    assert caught.value.reason == "ADAPTER_LEASED"
    assert caught.value.retry_after == 40
    assert sessions.holder("p1") is one
    assert list(two.leases) == []


def test_a_dead_sessions_lease_is_free_even_before_the_sweep(sessions, clock):
    one = sessions.open("one", 10)
    sessions.take(one, "p1")
    clock.pass_(10)
    two = sessions.open("two", 10)
    assert sessions.holder("p1") is None
    sessions.take(two, "p1")
    sessions.sweep()
    assert sessions.holder("p1") is two


def test_closing_gives_all_leases_back(sessions):
    one, two = sessions.open("one", 10), sessions.open("two", 10)
    for name in ("p1", "p2"):
        sessions.take(one, name)
    sessions.close(one.session_id)
    for name in ("p1", "p2"):
        sessions.take(two, name)
    assert list(two.leases) == ["p1", "p2"]
    with pytest.raises(NotFound):
        sessions.close(one.session_id)


def test_require_takes_a_free_lease_and_denies_another_ones(sessions):
    one, two = sessions.open("one", 10), sessions.open("two", 10)
    sessions.require(None, "p1")  # nobody holds it
    sessions.require(one, "p1")
    assert sessions.holder("p1") is one
    for other in (two, None):
        with pytest.raises(PermissionDenied, match="'one'") as caught:
            sessions.require(other, "p1")
        assert caught.value.reason == "NOT_LEASE_HOLDER"


def test_there_is_a_most_of_sessions_and_dead_ones_do_not_count(clock):
    sessions = Sessions(clock, max_sessions=2)
    for _ in range(2):
        sessions.open("", 10)
    with pytest.raises(ResourceExhausted) as caught:
        sessions.open("", 10)
    assert caught.value.reason == "TOO_MANY_SESSIONS"
    clock.pass_(10)
    sessions.open("", 10)
