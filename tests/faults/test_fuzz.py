"""Random requests and files: whatever comes, the answer is no INTERNAL, and the server lives.

`ONEBASE_FUZZ=5000` tries so many of each.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from faults.conftest import Place
from faults.test_bytes import policy, upload
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.harness import refusal_of

from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2

pytestmark = pytest.mark.e2e

COUNT = int(os.environ.get("ONEBASE_FUZZ", "25"))
FUZZ = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize="ONEBASE_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
METHODS = [
    method
    for module in (adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
BAD = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS)
NAMES = st.sampled_from(["p", "r", "base", "", "x", "../x", "policy", "q_proj", "all-linear", "w5 w6", "\0", "é" * 70])
INTEGERS = st.one_of(st.integers(-2, 20), st.sampled_from([-(2**31), 2**31 - 1, 127, 128]))
LONG = st.one_of(INTEGERS, st.sampled_from([-(2**63), 2**63 - 1, 2**40]))
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, 1e-4]))
KINDS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.one_of(NAMES, st.text(max_size=8)),
    FieldDescriptor.TYPE_BYTES: st.one_of(st.binary(max_size=24), st.just(struct.pack("<3i", 5, 6, 7))),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: FLOATS,
    FieldDescriptor.TYPE_DOUBLE: FLOATS,
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 8),
    FieldDescriptor.TYPE_INT32: INTEGERS,
    FieldDescriptor.TYPE_INT64: LONG,
}


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, session: str, depth: int = 0) -> Message:
    """A message of this kind, with some of its fields set to something."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if field.name == "session_id":
            message.session_id = draw(st.sampled_from([session, session, "", "x"]))  # type: ignore[attr-defined]
        elif depth < 5 and draw(st.integers(0, 3)):
            _fill(draw, message, field, session, depth)
    return message


def _fill(draw: st.DrawFn, message: Message, field: FieldDescriptor, session: str, depth: int) -> None:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        key, value = inner.fields_by_name["key"], inner.fields_by_name["value"]
        getattr(message, field.name)[draw(KINDS[key.type])] = draw(KINDS[value.type])
    elif inner is not None:
        for _ in range(draw(st.integers(1, 2)) if field.is_repeated else 1):
            there = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
            there.CopyFrom(draw(messages(inner, session, depth + 1)))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(KINDS[field.type], max_size=3)))
    else:
        setattr(message, field.name, draw(KINDS[field.type]))


def ask(call: Callable[[], Any]) -> None:
    """Calls, and reads what comes; only a bug fails."""
    try:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)
    except grpc.RpcError as error:
        refusal = refusal_of(error)
        assert refusal.code not in BAD, refusal


@pytest.fixture(scope="module")
def place(make_place: Callable[..., Place]) -> Place:
    """A server of its own: some of what comes is carried out, and writes under its root."""
    return make_place("--tenant-quota", "adapter_bytes=64M")


@pytest.fixture(scope="module")
def session(place: Place) -> str:
    fuzz = place.as_("fuzz")
    fuzz.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="x", value_head=True))
    opened = fuzz.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="x", ttl_seconds=3600))
    return opened.session_id


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_random_requests(place: Place, session: str, method: MethodDescriptor) -> None:
    channel = place.as_("fuzz").channel
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        send = channel.stream_unary(path)
    else:
        send = (channel.unary_stream if method.server_streaming else channel.unary_unary)(path)

    @FUZZ
    @given(data=st.data())
    def fuzz(data: st.DataObject) -> None:
        raw = data.draw(
            st.one_of(
                messages(method.input_type, session).map(lambda message: message.SerializeToString()),
                st.binary(max_size=64),
            )
        )
        ask(lambda: send(iter([raw]) if method.client_streaming else raw, timeout=20))

    fuzz()


def test_random_files(place: Place) -> None:
    files = policy(place)
    fuzz = place.as_("fuzz-files")

    @FUZZ
    @given(data=st.data())
    def spoil(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(files)))
        whole = bytearray(files[name])
        # The beginning, where lengths, names, shapes and offsets are, more often than the numbers behind it.
        for _ in range(data.draw(st.integers(1, 4))):
            place_ = data.draw(st.one_of(st.integers(0, min(len(whole), 400) - 1), st.integers(0, len(whole) - 1)))
            whole[place_] = data.draw(st.integers(0, 255))
        cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
        ask(lambda: fuzz.adapters.UploadAdapter(upload("x", {**files, name: bytes(whole[:cut])}), timeout=20))

    spoil()
