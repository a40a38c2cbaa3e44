"""SessionService: a client's lease on its adapters."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: ARG002, D102, N802

from __future__ import annotations

from typing import Any

import grpc

from onebase.server.codec.server import read_label, read_ttl, session_message
from onebase.server.edge import Edge
from onebase.v1 import sessions_pb2, sessions_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class SessionService(sessions_pb2_grpc.SessionServiceServicer):
    """Sessions and their active adapters. Nothing here waits for the engine."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def OpenSession(self, request: sessions_pb2.OpenSessionRequest, context: Context) -> sessions_pb2.Session:
        label, ttl = read_label(request), read_ttl(request)
        old = self._edge.sessions.find(request.resume_session_id)
        name = request.ppo_adapter_name
        if name:
            self._edge.access.check_lease(old, name)
        session = old or self._edge.sessions.open(label, ttl)
        self._edge.sessions.renew(session, label, ttl)
        if name:
            self._edge.access.lease(session, name)
        await self._edge.keeper.synced()
        return session_message(session)

    async def GetSession(self, request: sessions_pb2.GetSessionRequest, context: Context) -> sessions_pb2.Session:
        return session_message(self._edge.sessions.get(request.session_id))

    async def SetActiveAdapter(
        self, request: sessions_pb2.SetActiveAdapterRequest, context: Context
    ) -> sessions_pb2.Session:
        session = self._edge.sessions.get(request.session_id)
        self._edge.access.lease(session, request.ppo_adapter_name)
        await self._edge.keeper.synced()
        return session_message(session)

    async def KeepAlive(self, request: sessions_pb2.KeepAliveRequest, context: Context) -> sessions_pb2.Session:
        return session_message(self._edge.sessions.get(request.session_id))

    async def CloseSession(
        self, request: sessions_pb2.CloseSessionRequest, context: Context
    ) -> sessions_pb2.CloseSessionResponse:
        self._edge.sessions.close(request.session_id)
        await self._edge.keeper.synced()
        return sessions_pb2.CloseSessionResponse()
