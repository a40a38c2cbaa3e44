from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
from server.harness import Clock

from onebase.server.errors import Aborted, NotFound, ResourceExhausted
from onebase.server.identity import Caller, caller, set_caller
from onebase.server.leases import MAX_STREAMS, Sessions


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
        with pytest.raises(Aborted, match="'one'") as caught:
            sessions.require(other, "p1")
        assert (caught.value.reason, caught.value.retry_after) == ("NOT_LEASE_HOLDER", 10)


def test_there_is_a_most_of_sessions_and_dead_ones_do_not_count(clock):
    sessions = Sessions(clock, max_sessions=2)
    for _ in range(2):
        sessions.open("", 10)
    with pytest.raises(ResourceExhausted) as caught:
        sessions.open("", 10)
    assert (caught.value.reason, caught.value.retry_after) == ("TOO_MANY_SESSIONS", 10)
    clock.pass_(10)
    sessions.open("", 10)


# ------------------------------------------------------------------------------------------------------ attending


@pytest.fixture
def abandoned(sessions):
    names = []
    sessions.abandoned = names.append
    return names


def test_the_ttl_of_an_attended_session_does_not_run(sessions, clock, abandoned):
    session = sessions.open("a", 10)
    sessions.take(session, "p1")
    with sessions.attend(session.session_id), sessions.attend(session.session_id):
        clock.pass_(1000)
        sessions.sweep()
        assert sessions.live() == [session]
    clock.pass_(9.9)
    assert sessions.live() == [session]
    clock.pass_(0.1)
    assert sessions.live() == []


def test_a_client_has_vanished_when_its_last_stream_ends_and_not_before(sessions, abandoned):
    session = sessions.open("a", 10)
    for name in ("p1", "p2"):
        sessions.take(session, name)
    with sessions.attend(session.session_id):
        with sessions.attend(session.session_id):
            pass
        assert (abandoned, session.vanished) == ([], False)
    assert (abandoned, session.vanished) == (["p1", "p2"], True)
    assert list(session.leases) == ["p1", "p2"]
    sessions.get(session.session_id)
    assert not session.vanished


def test_who_never_attended_has_not_vanished(sessions, abandoned):
    session = sessions.open("a", 10)
    sessions.take(session, "p1")
    with sessions.use(session.session_id):
        pass
    assert (abandoned, session.vanished) == ([], False)


def test_what_a_vanished_client_left_under_way_is_saved_when_it_ends(sessions, abandoned):
    session = sessions.open("a", 10)
    sessions.take(session, "p1")
    with sessions.use(session.session_id):
        with sessions.attend(session.session_id):
            pass
        abandoned.clear()
    assert abandoned == ["p1"]


def test_an_attended_session_that_is_closed_ends_its_streams_and_has_not_vanished(sessions, abandoned):
    session = sessions.open("a", 10)
    sessions.take(session, "p1")
    with sessions.attend(session.session_id) as (attended, news):
        assert attended is session
        sessions.close(session.session_id)
        assert news.is_set()
        assert not sessions.is_open(session)
    assert abandoned == []


def test_every_change_wakes_whoever_attends(sessions):
    session = sessions.open("a", 10)
    with sessions.attend(session.session_id) as (_, news):
        for change in (
            lambda: sessions.take(session, "p1"),
            lambda: sessions.activate(session, "p1"),
            lambda: sessions.renew(session, "b", 10),
            lambda: sessions.renew(session, "b", 20),
            lambda: sessions.drop("p1"),
            sessions.dismiss,
        ):
            news.clear()
            change()
            assert news.is_set()
        news.clear()
        sessions.renew(session, "b", 20)  # nothing new
        assert not news.is_set()


def test_few_streams_are_enough(sessions):
    session = sessions.open("a", 10)
    with ExitStack() as stack:
        for _ in range(MAX_STREAMS):
            stack.enter_context(sessions.attend(session.session_id))
        with pytest.raises(ResourceExhausted) as caught:
            stack.enter_context(sessions.attend(session.session_id))
        assert (caught.value.reason, caught.value.retry_after) == ("TOO_MANY_STREAMS", 8)
    with sessions.attend(session.session_id):
        pass


def test_a_stop_of_the_server_is_no_vanishing(sessions, abandoned):
    session = sessions.open("a", 10)
    sessions.take(session, "p1")
    with sessions.attend(session.session_id):
        sessions.dismiss()
    assert (abandoned, session.vanished) == ([], False)


def test_no_tenant_has_more_sessions_than_it_may(clock):
    sessions, before = Sessions(clock, max_per_tenant=2), caller()
    set_caller(Caller("red"))
    for ttl in (20, 10):
        sessions.open("", ttl)
    with pytest.raises(ResourceExhausted, match="'red' may have 2") as caught:
        sessions.open("", 10)
    assert (caught.value.reason, caught.value.retry_after) == ("QUOTA_SESSIONS", 10)
    set_caller(Caller("blue"))
    sessions.open("", 10)
    set_caller(Caller("red"))
    clock.pass_(10)
    sessions.open("", 10)
    set_caller(before)
