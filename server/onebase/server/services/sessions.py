"""SessionService: a client's lease on its adapters."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: ARG002, D102, N802

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from onebase.server.codec.server import read_label, read_ttl, session_message
from onebase.server.edge import Edge
from onebase.server.errors import OnebaseError
from onebase.server.guard import Admit
from onebase.server.idempotency import check_digest, check_request_id, digest_of
from onebase.v1 import sessions_pb2, sessions_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_LOOK_AGAIN_SECONDS = 10.0
_ATTEND = "/onebase.v1.SessionService/AttendSession"


class SessionService(sessions_pb2_grpc.SessionServiceServicer):
    """Sessions and their active adapters. Nothing here waits for the engine.

    Args:
        edge: the rooms behind.
        admit: says who makes a call: a token may expire or be revoked while a stream lives.
    """

    def __init__(self, edge: Edge, admit: Admit) -> None:
        self._edge = edge
        self._admit = admit

    async def OpenSession(self, request: sessions_pb2.OpenSessionRequest, context: Context) -> sessions_pb2.Session:
        label, ttl = read_label(request), read_ttl(request)
        check_request_id(request.request_id)
        digest, sessions = digest_of(request), self._edge.sessions
        old = sessions.begun_by(request.request_id)
        if old is not None:
            check_digest(old.digest, digest, request.request_id)
        old = old or sessions.find(request.resume_session_id)
        name = request.ppo_adapter_name
        if name:
            self._edge.access.check_lease(old, name)
        session = old or sessions.open(label, ttl, request.request_id, digest)
        sessions.renew(session, label, ttl)
        if name:
            self._edge.access.lease(session, name)
        try:
            await self._edge.keeper.synced(session.session_id)
        except OnebaseError:
            if old is None:  # its client will not know of it
                sessions.close(session.session_id)
            raise
        if not sessions.is_open(session):  # the call that began it could not make it durable, and ended it meanwhile
            return await self.OpenSession(request, context)
        return session_message(session)

    async def GetSession(self, request: sessions_pb2.GetSessionRequest, context: Context) -> sessions_pb2.Session:
        return session_message(self._edge.sessions.get(request.session_id))

    async def SetActiveAdapter(
        self, request: sessions_pb2.SetActiveAdapterRequest, context: Context
    ) -> sessions_pb2.Session:
        session = self._edge.sessions.get(request.session_id)
        self._edge.access.lease(session, request.ppo_adapter_name)
        await self._edge.keeper.synced(session.session_id)
        return session_message(session)

    async def KeepAlive(self, request: sessions_pb2.KeepAliveRequest, context: Context) -> sessions_pb2.Session:
        return session_message(self._edge.sessions.get(request.session_id))

    async def AttendSession(
        self, request: sessions_pb2.AttendSessionRequest, context: Context
    ) -> AsyncGenerator[sessions_pb2.Session, None]:
        sessions, metadata = self._edge.sessions, dict(context.invocation_metadata() or ())
        with sessions.attend(request.session_id) as (session, news):
            while sessions.is_open(session):
                refusal = self._edge.gate.refusal()
                if refusal is not None:
                    raise refusal
                news.clear()
                yield session_message(session)
                while not news.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                            await news.wait()
                    self._admit(_ATTEND, metadata)

    async def CloseSession(
        self, request: sessions_pb2.CloseSessionRequest, context: Context
    ) -> sessions_pb2.CloseSessionResponse:
        self._edge.sessions.close(request.session_id)
        await self._edge.keeper.synced(request.session_id)
        return sessions_pb2.CloseSessionResponse()
