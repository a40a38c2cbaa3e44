"""AdapterService: making, loading, saving and deleting adapters, on the server's disk and on this machine's."""

from __future__ import annotations

from collections.abc import Iterator

from onebase.client import types as t
from onebase.client.codec.rpc import Call, Rpc
from onebase.client.codec.values import (
    KINDS,
    build,
    decode_adapter,
    decode_version,
    encode_lora,
    encode_name,
    encode_pooling,
)
from onebase.client.files import File, Header, Outgoing, Part
from onebase.v1 import adapters_pb2 as pb
from onebase.v1 import types_pb2

CREATE = Rpc("AdapterService/CreateAdapter", pb.CreateAdapterRequest, types_pb2.Adapter, repeatable=True)
GET = Rpc("AdapterService/GetAdapter", pb.GetAdapterRequest, types_pb2.Adapter, repeatable=True)
LIST = Rpc("AdapterService/ListAdapters", pb.ListAdaptersRequest, pb.ListAdaptersResponse, repeatable=True)
DELETE = Rpc("AdapterService/DeleteAdapter", pb.DeleteAdapterRequest, pb.DeleteAdapterResponse, repeatable=True)
LOAD = Rpc("AdapterService/LoadAdapter", pb.LoadAdapterRequest, types_pb2.Adapter, repeatable=True)
SAVE = Rpc("AdapterService/SaveAdapter", pb.SaveAdapterRequest, pb.SaveAdapterResponse, repeatable=True)
CHECKPOINT = Rpc(
    "AdapterService/CheckpointAdapter", pb.CheckpointAdapterRequest, pb.CheckpointAdapterResponse, repeatable=True
)
CLIENT_STATE = Rpc(
    "AdapterService/GetClientState", pb.GetClientStateRequest, pb.GetClientStateResponse, repeatable=True
)

UPLOAD = Rpc("AdapterService/UploadAdapter", pb.UploadAdapterRequest, types_pb2.Adapter, repeatable=True)
DOWNLOAD = Rpc("AdapterService/DownloadAdapter", pb.DownloadAdapterRequest, pb.DownloadAdapterResponse, repeatable=True)


def create(
    name: str,
    lora: t.LoraSpec | None,
    *,
    kind: t.AdapterKind,
    value_head: bool,
    init_from: str,
    seed: int,
    request_id: str,
    session_id: str = "",
) -> Call[t.Adapter]:
    """CreateAdapter."""
    request = build(
        pb.CreateAdapterRequest,
        session_id=session_id,
        request_id=request_id,
        name=name,
        lora=None if lora is None else encode_lora(lora),
        value_head=value_head,
        seed=seed,
        kind=encode_name(KINDS, kind, "kind"),
        init_from=init_from,
    )
    return CREATE.call(request, decode_adapter)


def get(name: str) -> Call[t.Adapter]:
    """GetAdapter."""
    return GET.call(build(pb.GetAdapterRequest, name=name), decode_adapter)


def list_adapters(kind: t.AdapterKind | None) -> Call[list[t.Adapter]]:
    """ListAdapters."""
    number = None if kind is None else encode_name(KINDS, kind, "kind")
    return LIST.call(build(pb.ListAdaptersRequest, kind=number), _read_adapters)


def _read_adapters(response: pb.ListAdaptersResponse) -> list[t.Adapter]:
    return [decode_adapter(adapter) for adapter in response.adapters]


def delete(name: str, *, request_id: str, session_id: str = "") -> Call[None]:
    """DeleteAdapter."""
    request = build(pb.DeleteAdapterRequest, session_id=session_id, request_id=request_id, name=name)
    return DELETE.call(request, _read_nothing)


def _read_nothing(response: pb.DeleteAdapterResponse) -> None:  # noqa: ARG001
    return None


def load(
    name: str,
    path: str,
    *,
    kind: t.AdapterKind,
    value_head: bool,
    replace: bool,
    with_optimizer: bool,
    seed: int,
    append_eos: bool | None,
    pooling: t.Pooling | None,
    request_id: str,
    session_id: str = "",
) -> Call[t.Adapter]:
    """LoadAdapter."""
    request = build(
        pb.LoadAdapterRequest,
        session_id=session_id,
        request_id=request_id,
        name=name,
        kind=encode_name(KINDS, kind, "kind"),
        path=path,
        value_head=value_head,
        replace=replace,
        with_optimizer=with_optimizer,
        seed=seed,
        append_eos=append_eos,
        pooling=encode_pooling(pooling),
    )
    return LOAD.call(request, decode_adapter)


def save(
    name: str,
    path: str,
    *,
    with_optimizer: bool,
    overwrite: bool,
    merged: bool,
    request_id: str,
    session_id: str = "",
) -> Call[t.SavedAdapter]:
    """SaveAdapter."""
    request = build(
        pb.SaveAdapterRequest,
        session_id=session_id,
        request_id=request_id,
        name=name,
        path=path,
        with_optimizer=with_optimizer,
        overwrite=overwrite,
        merged=merged,
    )
    return SAVE.call(request, _read_saved)


def _read_saved(response: pb.SaveAdapterResponse) -> t.SavedAdapter:
    return t.SavedAdapter(path=response.path, adapter=decode_version(response.adapter), bytes=response.bytes)


def checkpoint(
    name: str, *, client_state: bytes | None, request_id: str, session_id: str = ""
) -> Call[t.AdapterVersion]:
    """CheckpointAdapter."""
    request = build(
        pb.CheckpointAdapterRequest,
        session_id=session_id,
        request_id=request_id,
        name=name,
        client_state=client_state,
    )
    return CHECKPOINT.call(request, _read_durable)


def _read_durable(response: pb.CheckpointAdapterResponse) -> t.AdapterVersion:
    return decode_version(response.adapter)


def client_state(name: str) -> Call[t.ClientState]:
    """GetClientState."""
    return CLIENT_STATE.call(build(pb.GetClientStateRequest, name=name), _read_client_state)


def _read_client_state(response: pb.GetClientStateResponse) -> t.ClientState:
    return t.ClientState(adapter=decode_version(response.adapter), data=response.client_state)


def upload(
    name: str,
    what: Outgoing,
    *,
    kind: t.AdapterKind,
    value_head: bool,
    replace: bool,
    with_optimizer: bool,
    seed: int,
    append_eos: bool | None,
    pooling: t.Pooling | None,
    request_id: str,
    session_id: str = "",
) -> Call[t.Adapter]:
    """UploadAdapter."""
    header = build(
        pb.UploadAdapterHeader,
        session_id=session_id,
        request_id=request_id,
        name=name,
        kind=encode_name(KINDS, kind, "kind"),
        files=[pb.AdapterFile(name=one.name, bytes=one.bytes, sha256=one.sha256) for one in what.files],
        value_head=value_head,
        replace=replace,
        with_optimizer=with_optimizer,
        seed=seed,
        append_eos=append_eos,
        pooling=encode_pooling(pooling),
    )

    def body() -> Iterator[pb.UploadAdapterRequest]:
        return (pb.UploadAdapterRequest(data=piece) for piece in what.pieces())

    return UPLOAD.call(pb.UploadAdapterRequest(header=header), decode_adapter, body)


def download(name: str, *, with_optimizer: bool, session_id: str = "") -> Call[Part]:
    """DownloadAdapter."""
    request = build(pb.DownloadAdapterRequest, session_id=session_id, name=name, with_optimizer=with_optimizer)
    return DOWNLOAD.call(request, _read_part)


def _read_part(response: pb.DownloadAdapterResponse) -> Part:
    if not response.HasField("header"):
        return response.data
    header = response.header
    files = tuple(File(name=one.name, bytes=one.bytes, sha256=one.sha256) for one in header.files)
    return Header(decode_version(header.adapter), files)
