"""AttendSession: a stream that lives as long as its client does."""

from __future__ import annotations

import itertools
import threading
import time

import grpc
import pytest
from server.harness import Live, refusal_of, refused
from server.tenants import Guarded

from onebase.server.config import EngineConfig, Quota, Security, ServerConfig
from onebase.server.durability import Volatile
from onebase.server.services import sessions as service
from onebase.v1 import adapters_pb2, sessions_pb2

Open = sessions_pb2.OpenSessionRequest


class Keeper(Volatile):
    """Notes what is abandoned, and when a lease ends."""

    def __init__(self):
        self.seen = []
        self.news = threading.Condition()

    def _note(self, *what):
        with self.news:
            self.seen.append(what)
            self.news.notify_all()

    def abandoned(self, key):
        self._note("abandoned", key)

    def lease_ended(self, key):
        self._note("ended", key)

    def wait_for(self, *what):
        with self.news:
            assert self.news.wait_for(lambda: what in self.seen, timeout=20), self.seen


@pytest.fixture
def keeper():
    return Keeper()


@pytest.fixture
def live(keeper):
    """A server with the policies p1 and p2, which ends idle streams after a moment."""
    security = Security(stream_idle_seconds=0.2)
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, security=security)
    with Live(config, keeper=keeper) as server:
        for name in ("p1", "p2"):
            server.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=name))
        yield server


@pytest.fixture
def session(live):
    return live.sessions.OpenSession(Open(ppo_adapter_name="p1", label="one", ttl_seconds=5)).session_id


def attend(stubs, session):
    """An open stream, and its first message."""
    stream = stubs.sessions.AttendSession(sessions_pb2.AttendSessionRequest(session_id=session))
    return stream, next(stream)


def streams(live, session):
    return live.on_loop(lambda: len(live.edge.sessions._sessions[session].streams))


def test_the_session_comes_at_once_and_whenever_it_changes(live, session):
    stream, first = attend(live, session)
    assert first == live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session))
    live.sessions.SetActiveAdapter(sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name="p2"))
    changed = next(one for one in stream if one.ppo_adapter_name == "p2")
    assert list(changed.leases) == ["p1", "p2"]
    live.sessions.OpenSession(Open(resume_session_id=session, label="two", ttl_seconds=9))
    assert next(one for one in stream if one.label == "two").ttl_seconds == 9
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="p1", session_id=session))
    assert list(next(one for one in stream if "p1" not in one.leases).leases) == ["p2"]


def test_neither_its_ttl_nor_the_limit_of_idle_streams_ends_it(live, session, keeper):
    stream, _ = attend(live, session)
    time.sleep(1.5)  # longer than idle streams may be, and the server has looked for dead sessions
    live.clock.pass_(100)
    time.sleep(1.5)
    live.sessions.OpenSession(Open(resume_session_id=session, label="still here", ttl_seconds=5))
    assert next(stream).label == "still here"
    assert keeper.seen == []


def test_a_stream_that_breaks_is_a_client_that_vanished_until_it_comes_back(live, session, keeper, caplog):
    stream, _ = attend(live, session)
    stream.cancel()
    keeper.wait_for("abandoned", "p1")
    assert "session 'one': its client is gone; leases are kept for 5 s: p1" in caplog.text
    assert session not in caplog.text
    live.clock.pass_(4)
    stream, back = attend(live, session)
    assert list(back.leases) == ["p1"]
    live.clock.pass_(100)
    stream.cancel()
    while streams(live, session):
        time.sleep(0.01)
    live.clock.pass_(5)
    keeper.wait_for("ended", "p1")
    refusal = refused(live.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id=session))
    assert refusal.reason == "SESSION_NOT_FOUND"


def test_a_session_that_is_closed_ends_its_streams_without_an_error(live, session, keeper):
    both = [attend(live, session)[0] for _ in range(2)]
    live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    assert [list(stream) for stream in both] == [[], []]
    assert ("abandoned", "p1") not in keeper.seen


def test_there_are_only_so_many_streams(live, session):
    kept = [attend(live, session)[0] for _ in range(4)]
    request = sessions_pb2.AttendSessionRequest(session_id=session)
    refusal = refused(live.sessions.AttendSession, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert refusal.retry_after == 8
    kept[0].cancel()
    while streams(live, session) == 4:
        time.sleep(0.01)
    attend(live, session)


def test_a_session_that_is_not_there_cannot_be_attended(live):
    refusal = refused(live.sessions.AttendSession, sessions_pb2.AttendSessionRequest(session_id="f" * 32))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.NOT_FOUND,
        "SESSION_NOT_FOUND",
        "session_id",
    )


def test_a_stop_does_not_wait_for_it_and_says_unavailable(live, session, keeper):
    stream, _ = attend(live, session)
    began = time.monotonic()
    live.begin_stop()
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert (caught.value.code(), refusal_of(caught.value).reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    live.join()
    assert time.monotonic() - began < 4
    assert ("abandoned", "p1") not in keeper.seen


def test_another_tenants_session_is_not_there(tmp_path):
    with Guarded(tmp_path) as live:
        red, blue = live.as_("red"), live.as_("blue")
        session = red.sessions.OpenSession(Open()).session_id
        refusal = refused(blue.sessions.AttendSession, sessions_pb2.AttendSessionRequest(session_id=session))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        attend(red, session)


def test_a_revoked_token_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "_LOOK_AGAIN_SECONDS", 0.1)
    with Guarded(tmp_path) as live:
        red = live.as_("red")
        stream, _ = attend(red, red.sessions.OpenSession(Open()).session_id)
        live.file.revoke(red.token.split("_")[1])
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_it_takes_no_request_of_a_tenants_quota(tmp_path):
    with Guarded(tmp_path, tenant_quota=Quota(requests=1)) as live:
        red = live.as_("red")
        for _ in range(3):
            attend(red, red.sessions.OpenSession(Open()).session_id)
        red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="p1"))


def test_one_tenant_cannot_use_all_sessions_up(tmp_path):
    with Guarded(tmp_path, tenant_quota=Quota(sessions=2)) as live:
        red, blue = live.as_("red"), live.as_("blue")
        for _ in range(2):
            red.sessions.OpenSession(Open(ttl_seconds=7))
        refusal = refused(red.sessions.OpenSession, Open())
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_SESSIONS")
        assert refusal.retry_after == 7
        blue.sessions.OpenSession(Open())


def test_by_default_a_tenant_has_a_quarter_of_the_sessions(tmp_path):
    with Guarded(tmp_path, quota=Quota(sessions=3)) as live:
        assert live.config.quota_of_tenants().sessions == 1024
        for tenant in itertools.islice(itertools.cycle(("red", "blue")), 3):
            live.as_(tenant).sessions.OpenSession(Open())
        refusal = refused(live.as_("green").sessions.OpenSession, Open())
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SESSIONS")
