"""ServerService: what this server is, and what it is doing."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: ARG002, D102, N802

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import grpc

from onebase.server import process
from onebase.server.calls import deadline_of
from onebase.server.codec.adapters import adapter_message
from onebase.server.codec.server import base_message, limits_message, session_status, status_message
from onebase.server.edge import Edge
from onebase.server.identity import OPERATOR, caller
from onebase.server.jobs import AdapterKind
from onebase.v1 import server_pb2, server_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Facts about the server."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def GetServerInfo(self, request: server_pb2.GetServerInfoRequest, context: Context) -> server_pb2.ServerInfo:
        edge = self._edge
        return server_pb2.ServerInfo(
            version=importlib.metadata.version("onebase"),
            base=base_message(edge.worker.facts),
            limits=limits_message(edge.config.limits),
            reward_adapters=[entry.name for entry in edge.registry.entries(AdapterKind.REWARD)],
        )

    async def GetStatus(self, request: server_pb2.GetStatusRequest, context: Context) -> server_pb2.ServerStatus:
        edge = self._edge
        await edge.catalog.refresh(deadline_of(context))
        sessions = edge.sessions
        rss, peak_rss = process.memory()
        operator = caller().tenant == OPERATOR  # sees what all tenants have, as "tenant/name"
        entries = await edge.keeper.shown(edge.registry.of_tenant(None) if operator else edge.registry.entries())
        return status_message(
            edge.worker.status(),
            sessions=[session_status(s, age=sessions.age(s), idle=sessions.idle(s)) for s in sessions.live()],
            adapters=[
                adapter_message(
                    entry,
                    leased=sessions.holder(entry.key) is not None,
                    durable=edge.keeper.durable_version(entry.uid),
                    all_names=operator,
                )
                for entry in entries
            ],
            process={
                "uptime_seconds": time.monotonic() - edge.started,
                "rss_bytes": rss,
                "peak_rss_bytes": peak_rss,
            },
            base_bytes=edge.worker.facts.weights_bytes,
        )
