from __future__ import annotations

import grpc
import pytest
from server.harness import refused

from onebase.v1 import adapters_pb2, server_pb2, sessions_pb2

Open = sessions_pb2.OpenSessionRequest


def test_a_session_as_its_client_sees_it(live):
    session = live.sessions.OpenSession(Open(ppo_adapter_name="p1", label="trainer ü", ttl_seconds=30))
    assert len(session.session_id) == 32
    assert (session.ppo_adapter_name, session.label, session.ttl_seconds) == ("p1", "trainer ü", 30)
    assert list(session.leases) == ["p1"]
    for call, request in (
        (live.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id=session.session_id)),
        (live.sessions.KeepAlive, sessions_pb2.KeepAliveRequest(session_id=session.session_id)),
    ):
        assert call(request) == session


def test_the_default_ttl_is_a_minute_and_any_call_renews_it(live):
    session = live.sessions.OpenSession(Open())
    assert session.ttl_seconds == 60
    alive = sessions_pb2.KeepAliveRequest(session_id=session.session_id)
    for _ in range(3):
        live.clock.pass_(59)
        live.sessions.KeepAlive(alive)
    live.clock.pass_(60)
    refusal = refused(live.sessions.KeepAlive, alive)
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.NOT_FOUND,
        "SESSION_NOT_FOUND",
        "session_id",
    )
    assert session.session_id not in refusal.message


def test_an_adapter_is_leased_to_one_session_at_a_time(live, session):
    live.clock.pass_(10)
    refusal = refused(live.sessions.OpenSession, Open(ppo_adapter_name="p1", label="two"))
    assert (refusal.code, refusal.reason, refusal.retry_after) == (grpc.StatusCode.ABORTED, "ADAPTER_LEASED", 50)
    assert "'one'" in refusal.message
    assert len(live.on_loop(live.edge.sessions.live)) == 1  # the refused one left nothing
    two = live.sessions.OpenSession(Open(label="two"))
    request = sessions_pb2.SetActiveAdapterRequest(session_id=two.session_id, ppo_adapter_name="p1")
    refusal = refused(live.sessions.SetActiveAdapter, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ADAPTER_LEASED")
    live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    assert list(live.sessions.SetActiveAdapter(request).leases) == ["p1"]


def test_an_expired_sessions_adapter_is_free(live, session):
    live.clock.pass_(60)
    assert list(live.sessions.OpenSession(Open(ppo_adapter_name="p1")).leases) == ["p1"]
    refusal = refused(live.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id=session))
    assert refusal.reason == "SESSION_NOT_FOUND"


def test_another_active_adapter_keeps_the_old_ones_lease(live, session):
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="p2"))
    request = sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name="p2")
    now = live.sessions.SetActiveAdapter(request)
    assert (now.ppo_adapter_name, list(now.leases)) == ("p2", ["p1", "p2"])


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("p2", grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        ("r1", grpc.StatusCode.FAILED_PRECONDITION, "WRONG_ADAPTER_KIND"),
        ("base", grpc.StatusCode.FAILED_PRECONDITION, "WRONG_ADAPTER_KIND"),
        ("", grpc.StatusCode.INVALID_ARGUMENT, "REQUIRED"),
    ],
)
def test_only_a_policy_becomes_active(live, session, name, code, reason):
    request = sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name=name)
    refusal = refused(live.sessions.SetActiveAdapter, request)
    assert (refusal.code, refusal.reason, refusal.field) == (code, reason, "ppo_adapter_name")
    if name:
        assert refused(live.sessions.OpenSession, Open(ppo_adapter_name=name)).reason == reason
    assert live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)).ppo_adapter_name == "p1"


def test_a_living_session_is_resumed_with_its_leases_and_a_dead_one_begins_anew(live, session):
    resumed = live.sessions.OpenSession(
        Open(resume_session_id=session, ppo_adapter_name="p1", label="again", ttl_seconds=9)
    )
    assert (resumed.session_id, resumed.label, resumed.ttl_seconds) == (session, "again", 9)
    live.clock.pass_(9)
    fresh = live.sessions.OpenSession(Open(resume_session_id=session, ppo_adapter_name="p1"))
    assert fresh.session_id != session
    assert list(fresh.leases) == ["p1"]


def test_a_session_is_opened_once_for_a_request_id(live):
    request = Open(ppo_adapter_name="p1", label="one", request_id="it")
    first = live.sessions.OpenSession(request)
    assert live.sessions.OpenSession(request) == first
    refusal = refused(live.sessions.OpenSession, Open(ppo_adapter_name="p1", label="two", request_id="it"))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.ABORTED,
        "REQUEST_ID_REUSED",
        "request_id",
    )
    assert len(live.on_loop(live.edge.sessions.live)) == 1
    assert live.sessions.OpenSession(Open(request_id="another")).session_id != first.session_id
    assert len({live.sessions.OpenSession(Open()).session_id for _ in range(2)}) == 2  # no id, no retry


def test_a_request_id_whose_session_ended_opens_another(live):
    request = Open(ppo_adapter_name="p1", request_id="it")
    first = live.sessions.OpenSession(request)
    live.clock.pass_(60)
    second = live.sessions.OpenSession(request)
    assert (second.session_id != first.session_id, list(second.leases)) == (True, ["p1"])


def test_a_bad_request_id_opens_nothing(live):
    refusal = refused(live.sessions.OpenSession, Open(request_id="x" * 129))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_REQUEST_ID",
        "request_id",
    )
    assert live.on_loop(live.edge.sessions.live) == []


def test_a_closed_session_is_gone(live, session):
    request = sessions_pb2.CloseSessionRequest(session_id=session)
    live.sessions.CloseSession(request)
    assert refused(live.sessions.CloseSession, request).reason == "SESSION_NOT_FOUND"
    assert live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p1")).leased is False


def test_an_empty_id_is_no_session(live):
    refusal = refused(live.sessions.GetSession, sessions_pb2.GetSessionRequest())
    assert refusal.reason == "SESSION_NOT_FOUND"


def test_the_status_shows_sessions_without_their_ids(live, session):
    live.clock.pass_(7)
    status = live.server.GetStatus(server_pb2.GetStatusRequest())
    (shown,) = status.sessions
    assert (shown.label, shown.ppo_adapter_name, list(shown.leases)) == ("one", "p1", ["p1"])
    assert (shown.age_seconds, shown.idle_seconds, shown.requests_in_flight) == (7, 7, 0)
    assert session not in str(status)
