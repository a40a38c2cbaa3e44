"""Files on their way to a server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onebase.v1 import adapters_pb2, types_pb2

if TYPE_CHECKING:
    from faults.conftest import Place

POLICY = types_pb2.ADAPTER_KIND_POLICY


def upload(name: str, files: dict[str, bytes], **header: str) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """The messages that send these files, with true hashes; `header` are more of its fields."""
    described = [
        adapters_pb2.AdapterFile(name=one, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for one, data in files.items()
    ]
    first = adapters_pb2.UploadAdapterHeader(name=name, kind=POLICY, files=described, replace=True, **header)
    yield adapters_pb2.UploadAdapterRequest(header=first)
    for data in files.values():
        for begin in range(0, len(data), 2**20):
            yield adapters_pb2.UploadAdapterRequest(data=data[begin : begin + 2**20])


def policy(place: Place) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (place.root / "policy" / name).read_bytes() for name in names}
