"""AdapterService: making, loading, saving and deleting adapters."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: ARG002, D102, N802

from __future__ import annotations

from typing import Any

import grpc

from onebase.server.codec import adapters as codec
from onebase.server.edge import Edge
from onebase.server.leases import Session
from onebase.server.registry import Entry
from onebase.v1 import adapters_pb2, adapters_pb2_grpc, types_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The adapters of this server."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def CreateAdapter(self, request: adapters_pb2.CreateAdapterRequest, context: Context) -> types_pb2.Adapter:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> types_pb2.Adapter:
            new = codec.read_create(request, edge.config.limits)
            return self._message(await edge.catalog.create(new, session, deadline))

        return await edge.once("CreateAdapter", request, context, work)

    async def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Context) -> types_pb2.Adapter:
        return self._message(self._edge.registry.get(request.name, "name"))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        entries = self._edge.registry.entries(codec.read_kind(request.kind))
        return adapters_pb2.ListAdaptersResponse(adapters=[self._message(entry) for entry in entries])

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        edge = self._edge

        async def work(session: Session | None, _deadline: float | None) -> adapters_pb2.DeleteAdapterResponse:
            edge.catalog.delete(request.name, session)
            return adapters_pb2.DeleteAdapterResponse()

        return await edge.once("DeleteAdapter", request, context, work)

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Context) -> types_pb2.Adapter:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> types_pb2.Adapter:
            loaded = codec.read_load(request, edge.roots)
            return self._message(await edge.catalog.load(loaded, session, deadline))

        return await edge.once("LoadAdapter", request, context, work)

    async def SaveAdapter(
        self, request: adapters_pb2.SaveAdapterRequest, context: Context
    ) -> adapters_pb2.SaveAdapterResponse:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> adapters_pb2.SaveAdapterResponse:
            entry = edge.registry.get(request.name, "name")
            saved = codec.read_save(request, edge.roots)
            return codec.save_response(entry.name, await edge.catalog.save(saved, entry, session, deadline))

        return await edge.once("SaveAdapter", request, context, work)

    def _message(self, entry: Entry) -> types_pb2.Adapter:
        return codec.adapter_message(entry, leased=self._edge.sessions.holder(entry.name) is not None)
