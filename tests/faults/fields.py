"""Where requests name adapters and sessions, as the contract's descriptors say; and requests to put a name into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from fuzz.calls import valid_requests
from fuzz.grammar import METHODS, path_of
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from server.harness import Refusal, refusal_of

from onebase.v1 import adapters_pb2, sessions_pb2

ADAPTERS = {"name", "adapter", "ppo_adapter_name", "init_from", "reference", "critic"}
SESSIONS = {"session_id"}
NEITHER = {
    "request_id", "resume_session_id", "label", "path", "text", "role", "content", "stop", "target_modules", "sha256",
    "key",
}  # fmt: skip
"""Strings of requests that name neither; a session that is resumed and not there is a new one, so that is no error."""


@dataclass(frozen=True)
class Field:
    """A field of a method's request."""

    method: MethodDescriptor
    path: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The field, as a test's id and an error's field has it: the first of what is repeated."""
        return ".".join(self.path)

    @property
    def may_be_empty(self) -> bool:
        """Whether an empty name leaves the choice to the server."""
        return self.path[-1] != "name" or self.method.name == "CheckpointAdapter"

    @property
    def names_what_is_made(self) -> bool:
        """Whether it is the name of an adapter that comes to be, and so the caller's own whatever others have."""
        return self.path[-1] == "name" and self.method.name in ("CreateAdapter", "LoadAdapter", "UploadAdapter")


def places(names: set[str]) -> list[Field]:
    """All fields of these names, in all requests of onebase's methods."""
    return [Field(method, path) for method in METHODS for path in strings(method.input_type) if _meant(path) in names]


def strings(kind: Descriptor) -> Iterator[tuple[str, ...]]:
    """The path of every string in a message of this kind; `rewards[0]` is an element of what is repeated."""
    for field in kind.fields:
        shown = f"{field.name}[0]" if field.is_repeated else field.name
        if field.message_type is not None:
            if field.message_type.full_name == "onebase.v1.AdapterFile":  # its name is a file's
                continue
            for path in strings(field.message_type):
                yield (shown, *path)
        elif field.type == FieldDescriptor.TYPE_STRING:
            yield (shown,)


def _meant(path: tuple[str, ...]) -> str:
    return path[-1].removesuffix("[0]")


def unknown() -> set[str]:
    """Strings of requests of which nobody has said here whether they name something."""
    found = {_meant(path) for method in METHODS for path in strings(method.input_type)}
    return found - ADAPTERS - SESSIONS - NEITHER


def valid(session: str) -> dict[str, list[Message]]:
    """A request of each method that names adapters or sessions, which this session may make of its policy `x`."""
    kinds = {method.name: GetMessageClass(method.input_type) for method in METHODS}
    found: dict[str, list[Message]] = {
        name: [kinds[name].FromString(raw) for raw in raws] for name, raws in valid_requests(session).items()
    }
    for request in found["Reward"]:
        request.session_id = session  # type: ignore[attr-defined]
    found |= {
        "CreateAdapter": [adapters_pb2.CreateAdapterRequest(session_id=session, name="y")],  # room for `init_from`
        "CheckpointAdapter": [adapters_pb2.CheckpointAdapterRequest(session_id=session, name="x")],
        "GetClientState": [adapters_pb2.GetClientStateRequest(name="x")],
        "AttendSession": [sessions_pb2.AttendSessionRequest(session_id=session)],
        "CloseSession": [sessions_pb2.CloseSessionRequest(session_id=session)],
    }
    return found


def put(messages: list[Message], path: tuple[str, ...], value: str) -> list[Message]:
    """These messages, with something else in a field of the first of them."""
    made = type(messages[0])()
    made.CopyFrom(messages[0])
    inner = made
    for part in path[:-1]:
        inner = getattr(inner, part.removesuffix("[0]"))
        if part.endswith("[0]"):
            inner = inner[0] if inner else inner.add()  # type: ignore[index, attr-defined]
    setattr(inner, path[-1], value)
    return [made, *messages[1:]]


def send(channel: grpc.Channel, token: str, method: MethodDescriptor, messages: list[Message]) -> Refusal | None:
    """What a method says to these messages; None where it carries them out."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    raws = [one.SerializeToString() for one in messages]
    made = getattr(channel, kind)(path_of(method))
    try:
        answer = made(
            iter(raws) if method.client_streaming else raws[0],
            timeout=60,
            metadata=(("authorization", f"Bearer {token}"),),
        )
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return refusal_of(error)
    return None
