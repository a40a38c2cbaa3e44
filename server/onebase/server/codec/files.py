"""Adapters that travel as files: what an upload and a download say of them. Fields are named as in the header."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from onebase.server.catalog import LoadedAdapter
from onebase.server.codec.adapters import read_loaded
from onebase.server.codec.fields import integer, required
from onebase.server.config import Limits
from onebase.server.errors import InvalidArgument, ResourceExhausted
from onebase.server.spool import SpooledFile
from onebase.v1 import adapters_pb2, types_pb2

NAMES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "value_head.safetensors",
    "optimizer.safetensors",
    "client_state.bin",
    "onebase.json",
)
"""What the directory of an adapter may hold."""
_NEEDED = NAMES[:2]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)

_UPLOADED = "uploaded"


@dataclass(frozen=True)
class Upload:
    """An adapter to load, whose path is still open, and the files that it will be read from."""

    loaded: LoadedAdapter
    files: tuple[SpooledFile, ...]


async def read_header(requests: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> adapters_pb2.UploadAdapterHeader:
    """The first message of an upload.

    Raises:
        InvalidArgument: REQUIRED: it is no header.
    """
    async for request in requests:
        if request.HasField("header"):
            return request.header
        break
    raise required("header", "it must be the first message of the stream")


async def read_data(requests: AsyncIterator[adapters_pb2.UploadAdapterRequest]) -> AsyncIterator[bytes]:
    """The bytes of the messages after the header.

    Raises:
        InvalidArgument: SECOND_HEADER.
    """
    async for request in requests:
        if request.HasField("header"):
            raise InvalidArgument(
                "SECOND_HEADER", "header came twice: begin another stream for another upload", field="header"
            )
        yield request.data


def read_upload(header: adapters_pb2.UploadAdapterHeader, limits: Limits) -> Upload:
    """Checks the header of an upload.

    Raises:
        InvalidArgument: naming the field.
        ResourceExhausted: LIMIT_EXCEEDED for more bytes than the server takes.
    """
    loaded = read_loaded(header, source=_UPLOADED)
    files = tuple(_read_file(file, f"files[{index}]") for index, file in enumerate(header.files))
    names = [file.name for file in files]
    for index, name in enumerate(names):
        if name in names[:index]:
            field = f"files[{index}].name"
            raise InvalidArgument("DUPLICATE_FILE", f"{field} is {name!r} again: send each file once", field=field)
    for needed in _NEEDED:
        if needed not in names:
            raise required("files", f"an adapter needs {needed}; send what PEFT's save_pretrained wrote")
    total = sum(file.bytes for file in files)
    if total > limits.max_upload_bytes:
        raise ResourceExhausted(
            "LIMIT_EXCEEDED",
            f"files have {total} bytes, and this server takes {limits.max_upload_bytes} in one upload: leave the "
            "optimizer's out, or serve with more --max-upload-bytes",
            field="files",
        )
    return Upload(loaded, files)


def _read_file(file: adapters_pb2.AdapterFile, where: str) -> SpooledFile:
    if file.name not in NAMES:
        shown = file.name[:64]
        if file.name.endswith(_PICKLES):
            raise InvalidArgument(
                "PICKLE_ADAPTER",
                f"{where}.name is {shown!r}, a pickle file, which can run code and is never opened: save it again with "
                "safe_serialization=True",
                field=f"{where}.name",
            )
        raise InvalidArgument(
            "UNKNOWN_FILE",
            f"{where}.name is {shown!r}: an adapter consists of {', '.join(NAMES)}; leave others out",
            field=f"{where}.name",
        )
    integer(file.bytes, f"{where}.bytes", least=1)
    if not _SHA256.fullmatch(file.sha256):
        raise InvalidArgument(
            "BAD_HASH",
            f"{where}.sha256 is {file.sha256[:64]!r}: give the SHA-256 as 64 hexadecimal digits in lower case",
            field=f"{where}.sha256",
        )
    return SpooledFile(file.name, file.bytes, file.sha256)


def download_header(name: str, version: int, files: Sequence[SpooledFile]) -> adapters_pb2.DownloadAdapterResponse:
    """The first message of a download: the adapter of that name, and the files that follow."""
    header = adapters_pb2.DownloadAdapterHeader(
        adapter=types_pb2.AdapterVersion(name=name, version=version),
        files=[adapters_pb2.AdapterFile(name=one.name, bytes=one.bytes, sha256=one.sha256) for one in files],
    )
    return adapters_pb2.DownloadAdapterResponse(header=header)


def download_data(piece: bytes) -> adapters_pb2.DownloadAdapterResponse:
    """Another message of a download."""
    return adapters_pb2.DownloadAdapterResponse(data=piece)
