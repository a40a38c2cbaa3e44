"""AdapterService: making, loading, saving and deleting adapters, on the server's disk and on the client's."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: ARG002, D102, N802

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from onebase.server.calls import deadline_of, looks_again, perform, settled, stream_looks_again
from onebase.server.catalog import Receipt, SavedAdapter
from onebase.server.codec import adapters as codec
from onebase.server.codec import files
from onebase.server.codec.training import read_client_state
from onebase.server.edge import Edge
from onebase.server.errors import AlreadyExists
from onebase.server.idempotency import record, stamp
from onebase.server.jobs import ClientStateJob, SaveResult
from onebase.server.leases import Session
from onebase.server.registry import Entry
from onebase.server.spool import Spool, described, pieces, receive, shown_as
from onebase.server.store import ResponseRow
from onebase.v1 import adapters_pb2, adapters_pb2_grpc, types_pb2

_FLOAT_BYTES, _WITH_MOMENTS = 4, 3

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The adapters of this server."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def CreateAdapter(self, request: adapters_pb2.CreateAdapterRequest, context: Context) -> types_pb2.Adapter:
        edge = self._edge

        @looks_again
        async def work(session: Session | None, deadline: float | None) -> types_pb2.Adapter:
            edge.check_room(session)
            new = codec.read_create(request, edge.config.limits)
            receipt = self._receipt("CreateAdapter", request, session)
            return self._message(await edge.catalog.create(new, session, deadline, receipt))

        return await edge.once("CreateAdapter", request, context, work)

    async def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Context) -> types_pb2.Adapter:
        (entry,) = await self._edge.keeper.shown([self._edge.registry.get(request.name, "name")])
        return self._message(entry)

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        entries = await self._edge.keeper.shown(self._edge.registry.entries(codec.read_kind(request.kind)))
        return adapters_pb2.ListAdaptersResponse(adapters=[self._message(entry) for entry in entries])

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> adapters_pb2.DeleteAdapterResponse:
            response = adapters_pb2.DeleteAdapterResponse()
            kept = record("DeleteAdapter", request, response)
            await edge.catalog.delete(request.name, session, deadline, kept)
            return response

        return await edge.once("DeleteAdapter", request, context, work)

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Context) -> types_pb2.Adapter:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> types_pb2.Adapter:
            edge.check_room(session)
            loaded = codec.read_loaded(request)
            receipt = self._receipt("LoadAdapter", request, session)
            async with edge.disks.reading(request.path) as (folder, source):
                loaded = replace(loaded, path=folder, source=source)
                return self._message(await edge.catalog.load(loaded, session, deadline, receipt))

        return await edge.once("LoadAdapter", request, context, work)

    async def SaveAdapter(
        self, request: adapters_pb2.SaveAdapterRequest, context: Context
    ) -> adapters_pb2.SaveAdapterResponse:
        edge = self._edge

        @looks_again
        async def work(session: Session | None, deadline: float | None) -> adapters_pb2.SaveAdapterResponse:
            entry = edge.registry.get(request.name, "name")
            asked = replace(codec.read_save(request), stamp=stamp("SaveAdapter", request))
            result = await self._save(request, asked, entry, session, deadline)
            response = codec.save_response(entry.name, result)
            answered = record("SaveAdapter", request, response)
            finish = partial(edge.keeper.answered, answered)  # it is there now: a repeated call must not save it again
            edge.idempotency.applied("SaveAdapter", request, response, finish)
            await finish()
            return response

        return await edge.once("SaveAdapter", request, context, work)

    async def _save(
        self,
        request: adapters_pb2.SaveAdapterRequest,
        asked: SavedAdapter,
        entry: Entry,
        session: Session | None,
        deadline: float | None,
    ) -> SaveResult:
        """Saves an adapter, unless this very call has done so before, and a kill came between that and its answer."""
        edge = self._edge
        try:
            async with edge.disks.writing(request.path, overwrite=request.overwrite) as (folder, final):
                result = await edge.catalog.save(replace(asked, path=folder), entry, session, deadline)
                await settled(edge.keeper.seen({entry.uid: result.version}))
        except AlreadyExists:
            made = await edge.disks.saved(request.path, asked.stamp) if asked.stamp else None
            if made is None:
                raise
            return SaveResult(*made)
        return replace(result, path=final)

    async def CheckpointAdapter(
        self, request: adapters_pb2.CheckpointAdapterRequest, context: Context
    ) -> adapters_pb2.CheckpointAdapterResponse:
        edge = self._edge

        @looks_again
        async def work(session: Session | None, _deadline: float | None) -> adapters_pb2.CheckpointAdapterResponse:
            state = read_client_state(request)
            entry = edge.access.trainable(session, request.name, "name")
            edge.registry.check_may_change(entry)
            if state is not None:
                edge.access.require(session, entry)

            def answer(version: int) -> ResponseRow | None:
                return record("CheckpointAdapter", request, codec.checkpoint_response(entry.name, version))

            return codec.checkpoint_response(entry.name, await edge.keeper.checkpoint(entry, state, answer))

        return await edge.once("CheckpointAdapter", request, context, work)

    @looks_again
    async def GetClientState(
        self, request: adapters_pb2.GetClientStateRequest, context: Context
    ) -> adapters_pb2.GetClientStateResponse:
        entry = self._edge.registry.get(request.name, "name")
        self._edge.registry.check_may_change(entry)
        job = ClientStateJob(adapter=entry.uid)
        state = await perform(self._edge.worker, job, None, deadline_of(context))
        return codec.client_state_response(entry.name, state)

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Context
    ) -> types_pb2.Adapter:
        edge = self._edge
        header = await files.read_header(request_iterator)
        with edge.sessions.use(header.session_id) as session:
            edge.check_room(session)
            upload = files.read_upload(header, edge.config.limits)
            wanted = sum(file.bytes for file in upload.files)
            spool = Spool(edge.disks.scratch, edge.disks.transfers.take(wanted))
            with spool.used() as folder:
                await receive(files.read_data(request_iterator), upload.files, folder)

                async def work(session: Session | None, deadline: float | None) -> types_pb2.Adapter:
                    # A use of its own: a call of the same request_id may wait for this work when its own call is gone.
                    with spool.used(), shown_as(folder, ""):
                        loaded = replace(upload.loaded, path=folder)
                        receipt = self._receipt("UploadAdapter", header, session)
                        return self._message(await edge.catalog.load(loaded, session, deadline, receipt))

                return await edge.once("UploadAdapter", header, context, work)

    @stream_looks_again
    async def DownloadAdapter(
        self, request: adapters_pb2.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[adapters_pb2.DownloadAdapterResponse]:
        edge = self._edge
        with edge.sessions.use(request.session_id) as session, contextlib.ExitStack() as held:
            entry = edge.registry.get(request.name, "name")
            wanted = entry.facts.parameter_count * _FLOAT_BYTES * (_WITH_MOMENTS if request.with_optimizer else 1)
            folder = held.enter_context(Spool(edge.disks.scratch, edge.disks.transfers.take(wanted)).used())
            saved = SavedAdapter(entry.name, folder / "adapter", request.with_optimizer)
            result = await edge.catalog.save(saved, entry, session, deadline_of(context))
            await edge.keeper.seen({entry.uid: result.version})
            there = await described(result.path)
            yield files.download_header(entry.name, result.version, there)
            data = pieces(there, result.path)
            async with contextlib.aclosing(data):
                async for piece in data:
                    yield files.download_data(piece)

    def _message(self, entry: Entry) -> types_pb2.Adapter:
        leased, durable = self._edge.sessions.holder(entry.key), self._edge.keeper.durable_version(entry.uid)
        return codec.adapter_message(entry, leased=leased is not None, durable=durable)

    def _receipt(self, method: str, request: Message, session: Session | None) -> Receipt:
        """What the call that makes an entry is answered, before the session has its lease."""

        def receipt(entry: Entry) -> ResponseRow | None:
            taken = self._edge.sessions.holder(entry.key) is not None or (session is not None and entry.kind.trained)
            made = codec.adapter_message(entry, leased=taken, durable=entry.facts.version)
            return record(method, request, made)

        return receipt
