"""Bytes, arrays, names and files that are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from faults.conftest import Place, fresh
from server.harness import ids, pair, refused, text_of
from server.test_tokens import call, methods

from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, types_pb2

pytestmark = pytest.mark.e2e

INVALID = grpc.StatusCode.INVALID_ARGUMENT
POLICY = types_pb2.ADAPTER_KIND_POLICY


def test_12_bytes_that_are_no_message_are_refused_by_every_method(place: Place) -> None:
    token = f"Bearer {place.as_('red').token}"
    for name, streams in methods(place.channel, place.as_("red").token).items():
        if not name.startswith("/onebase."):
            continue
        refusal = call(place.channel, name, streams, token, b"\xff\xff\xff\xff")
        assert refusal is not None
        assert (refusal.code, refusal.reason) == (INVALID, "MALFORMED_MESSAGE"), name
    place.operator.server.GetServerInfo(server_pb2.GetServerInfoRequest())


@pytest.mark.parametrize(
    "tensor",
    [
        types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=[3], data=b"\0" * 8),
        types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=[2, 2], data=b"\0" * 16),
        types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=[-1], data=b"\0" * 8),
        types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=[2**40, 2**40], data=b""),
        types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=[2], data=b"\0" * 8),
        types_pb2.Tensor(dtype=99, shape=[2], data=b"\0" * 8),
    ],
)
def test_17_arrays_that_contradict_themselves_are_refused(place: Place, tensor: types_pb2.Tensor) -> None:
    sequence = types_pb2.Sequence(prompt=text_of("w5"), completion=types_pb2.Content(tokens=tensor))
    request = inference_pb2.LogprobRequest(adapter="base", sequences=[sequence])
    refusal = refused(place.as_("red").inference.Logprob, request)
    assert refusal.code is INVALID
    assert refusal.field.startswith("sequences[0].completion")


@pytest.mark.parametrize("token", [-1, 128, 2**31 - 1])
def test_18_ids_outside_the_vocabulary_are_refused(place: Place, token: int) -> None:
    red = place.as_("red")
    request = inference_pb2.LogprobRequest(adapter="base", sequences=[pair((5,), (token,))])
    refusal = refused(red.inference.Logprob, request)
    assert (refusal.code, refusal.field) == (INVALID, "sequences[0].completion.tokens")
    prompt = types_pb2.Content(tokens=ids(token))
    refusal = refused(
        red.inference.Generate,
        inference_pb2.GenerateRequest(adapter="base", prompts=[prompt], sampling={"max_new_tokens": 2}),
    )
    assert (refusal.code, refusal.field) == (INVALID, "prompts[0].tokens")


@pytest.mark.parametrize(
    "name", ["../x", "a\0b", "a/b", "red/p", ".", "", "ｐ", "p\u202e", "é", "a b", "x" * 65, "-rf"]
)
def test_20_what_is_no_name_is_refused_and_no_file_is_called_so(place: Place, name: str) -> None:
    red = place.as_("red")
    there = sorted(path.name for path in place.root.parent.rglob("*"))
    for method, request in (
        (red.adapters.CreateAdapter, adapters_pb2.CreateAdapterRequest(name=name)),
        (red.adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name=name)),
        (red.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name=name, path="x")),
        (red.adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name=name, path="policy", kind=POLICY)),
    ):
        refusal = refused(method, request)
        assert (refusal.code, refusal.reason) == (INVALID, "BAD_ADAPTER_NAME")
    assert sorted(path.name for path in place.root.parent.rglob("*")) == there


@pytest.mark.parametrize(
    "path", ["../tokens.json", "/etc", "link", "link/x", "policy/../../x", "\0", "a\0b", "x" * 5000]
)
def test_21_a_path_that_leads_outside_is_refused(place: Place, path: str) -> None:
    for folder in (place.root, own(place)):
        if not (folder / "link").is_symlink():
            (folder / "link").symlink_to(place.root.parent)
    red = place.as_("red")
    for method, request in (
        (red.adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name="x", path=path, kind=POLICY)),
        (red.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name="p", path=path)),
    ):
        assert refused(method, request).code in (INVALID, grpc.StatusCode.PERMISSION_DENIED)


def test_21_a_symlink_in_a_directory_is_not_followed_out_of_it(place: Place) -> None:
    name = fresh("linked")
    folder = Path(shutil.copytree(place.root / "policy", own(place) / name))
    outside = place.root.parent / f"{name}.safetensors"
    shutil.move(folder / "adapter_model.safetensors", outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)
    request = adapters_pb2.LoadAdapterRequest(name=name, path=name, kind=POLICY)
    refusal = refused(place.as_("red").adapters.LoadAdapter, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PATH_OUTSIDE_ROOTS")


@pytest.mark.parametrize("escape", ["../{}", "/tmp/{}", "a/../../{}", "{}\0", "./{}", "..", "a/{}", "\\{}"])
def test_21_a_file_of_an_upload_whose_name_leads_elsewhere_is_refused(place: Place, escape: str) -> None:
    red, base = place.as_("red"), place.root.parent
    there = sorted(path.name for path in base.rglob("*"))
    for name, data in policy(place).items():
        files = {**policy(place), escape.format(name): data}
        refusal = refused(red.adapters.UploadAdapter, upload("x", files))
        assert (refusal.code, refusal.field) == (INVALID, "files[2].name")
        del files[name]
        assert refused(red.adapters.UploadAdapter, upload("x", files)).code is INVALID
        assert not Path("/tmp", name).exists()
    assert sorted(path.name for path in base.rglob("*")) == there


def test_21_a_link_that_is_sent_is_a_file_of_that_text(place: Place) -> None:
    """Names and bytes are all that an upload has: no archive, so no links in it."""
    fields = adapters_pb2.AdapterFile.DESCRIPTOR.fields_by_name
    assert set(fields) == {"name", "bytes", "sha256"}
    files = {
        **policy(place),
        "adapter_model.safetensors": str(place.root / "policy/adapter_model.safetensors").encode(),
    }
    assert refused(place.as_("red").adapters.UploadAdapter, upload("x", files)).code is INVALID


def own(place: Place) -> Path:
    """The directory under the root that is the tenant red's."""
    path = place.root / "red"
    path.mkdir(exist_ok=True)
    return path


class Bang:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


def test_22_a_pickle_is_refused_and_never_opened(place: Place) -> None:
    name = fresh("pickled")
    folder = Path(shutil.copytree(place.root / "policy", own(place) / name))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bang(place.root / "opened")))
    red = place.as_("red")
    load = adapters_pb2.LoadAdapterRequest(name="x", path=name, kind=POLICY)
    assert refused(red.adapters.LoadAdapter, load).code is INVALID
    files = {"adapter_config.json": b"{}", "adapter_model.bin": (folder / "adapter_model.bin").read_bytes()}
    assert refused(red.adapters.UploadAdapter, upload("x", files)).code is INVALID
    assert not (place.root / "opened").exists()


def upload(name: str, files: dict[str, bytes]) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """The messages that send these files, with true hashes."""
    described = [
        adapters_pb2.AdapterFile(name=one, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for one, data in files.items()
    ]
    header = adapters_pb2.UploadAdapterHeader(name=name, kind=POLICY, files=described, replace=True)
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for data in files.values():
        for begin in range(0, len(data), 2**20):
            yield adapters_pb2.UploadAdapterRequest(data=data[begin : begin + 2**20])


def policy(place: Place) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (place.root / "policy" / name).read_bytes() for name in names}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty": b"",
    "short": b"\x01",
    "a huge header": safetensors({}, length=2**63),
    "a header of 100 MB that is not there": safetensors({}, length=100 * 2**20),
    "no JSON": safetensors(b"{" * 64),
    "deep JSON": safetensors(b"[" * 100_000),
    "overlapping": safetensors({"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}}, bytes(12)),
    "beyond the end": safetensors({"a": {**TENSOR, "data_offsets": [0, 800], "shape": [200]}}, bytes(8)),
    "backwards": safetensors({"a": {**TENSOR, "data_offsets": [8, 0]}}, bytes(8)),
    "another length than its shape": safetensors({"a": {**TENSOR, "shape": [2**40, 2**40]}}, bytes(8)),
    "a dtype that is none": safetensors({"a": {**TENSOR, "dtype": "X9"}}, bytes(8)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_23_a_file_of_tensors_that_is_none_is_refused(place: Place, broken: str) -> None:
    files = {**policy(place), "adapter_model.safetensors": BROKEN[broken]}
    refusal = refused(place.as_("red").adapters.UploadAdapter, upload("broken", files))
    assert refusal.code is INVALID, refusal
    assert all(one.name != "red/broken" for one in place.status().adapters)
    assert str(place.root.parent) not in refusal.message


def test_23_a_file_that_is_cut_off_is_refused_and_a_whole_one_is_taken(place: Place) -> None:
    red, files = place.as_("red"), policy(place)
    whole = files["adapter_model.safetensors"]
    for length in (8, 100, len(whole) // 2, len(whole) - 1):
        cut = {**files, "adapter_model.safetensors": whole[:length]}
        assert refused(red.adapters.UploadAdapter, upload("x", cut)).code is INVALID
    assert red.adapters.UploadAdapter(upload("x", files)).name == "x"
