"""SessionService: a client's lease on its adapters."""

from __future__ import annotations

from onebase.client import types as t
from onebase.client.codec.rpc import Call, Rpc
from onebase.client.codec.values import build
from onebase.v1 import sessions_pb2 as pb

OPEN = Rpc("SessionService/OpenSession", pb.OpenSessionRequest, pb.Session, repeatable=True)
GET = Rpc("SessionService/GetSession", pb.GetSessionRequest, pb.Session, repeatable=True)
SET_ACTIVE = Rpc("SessionService/SetActiveAdapter", pb.SetActiveAdapterRequest, pb.Session, repeatable=True)
KEEP_ALIVE = Rpc("SessionService/KeepAlive", pb.KeepAliveRequest, pb.Session, repeatable=True)
ATTEND = Rpc("SessionService/AttendSession", pb.AttendSessionRequest, pb.Session, repeatable=True)
# Who leaves does not wait for a server that is away: the leases run out by themselves.
CLOSE = Rpc("SessionService/CloseSession", pb.CloseSessionRequest, pb.CloseSessionResponse, repeatable=False)


def open_session(ppo_adapter_name: str, *, label: str, ttl: float, resume: str, request_id: str) -> Call[t.SessionInfo]:
    """OpenSession."""
    request = build(
        pb.OpenSessionRequest,
        ppo_adapter_name=ppo_adapter_name,
        label=label,
        ttl_seconds=ttl,
        resume_session_id=resume,
        request_id=request_id,
    )
    return OPEN.call(request, _read_session)


def get(session_id: str) -> Call[t.SessionInfo]:
    """GetSession."""
    return GET.call(build(pb.GetSessionRequest, session_id=session_id), _read_session)


def set_active(session_id: str, name: str) -> Call[t.SessionInfo]:
    """SetActiveAdapter."""
    return SET_ACTIVE.call(
        build(pb.SetActiveAdapterRequest, session_id=session_id, ppo_adapter_name=name), _read_session
    )


def keep_alive(session_id: str) -> Call[t.SessionInfo]:
    """KeepAlive."""
    return KEEP_ALIVE.call(build(pb.KeepAliveRequest, session_id=session_id), _read_session)


def attend(session_id: str) -> Call[t.SessionInfo]:
    """AttendSession."""
    return ATTEND.call(build(pb.AttendSessionRequest, session_id=session_id), _read_session)


def close(session_id: str) -> Call[None]:
    """CloseSession."""
    return CLOSE.call(build(pb.CloseSessionRequest, session_id=session_id), _read_nothing)


def _read_session(session: pb.Session) -> t.SessionInfo:
    return t.SessionInfo(
        session_id=session.session_id,
        ppo_adapter_name=session.ppo_adapter_name,
        label=session.label,
        leases=tuple(session.leases),
        ttl_seconds=session.ttl_seconds,
    )


def _read_nothing(response: pb.CloseSessionResponse) -> None:  # noqa: ARG001
    return None
