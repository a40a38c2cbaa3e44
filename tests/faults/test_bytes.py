"""Bytes, arrays, names and files that are not what they should be."""

from __future__ import annotations

import json
import struct

import grpc
import pytest
from faults.conftest import Place
from faults.uploads import policy, upload
from server.harness import ids, pair, refused, text_of
from server.test_tokens import call, methods

from onebase.v1 import inference_pb2, server_pb2, types_pb2

pytestmark = pytest.mark.e2e

INVALID = grpc.StatusCode.INVALID_ARGUMENT
POLICY = types_pb2.ADAPTER_KIND_POLICY


def test_12_bytes_that_are_no_message_are_refused_by_every_method(place: Place) -> None:
    token = f"Bearer {place.as_('red').token}"
    for name, streams in methods(place.channel, place.as_("red").token).items():
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
