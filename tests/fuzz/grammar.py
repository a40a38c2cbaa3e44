"""Random requests: messages that have the shape of a method's request, and bytes that only begin like one.

All draws are made from the `random.Random` that is passed in, so a seed makes the same inputs again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2

METHODS: list[MethodDescriptor] = [
    method
    for module in (adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
DEPTH = 5
NAMES = ["p", "r", "base", "", "x", "../x", "policy", "q_proj", "all-linear", "w5 w6", "\0", "é" * 70]
_SMALL, _EDGES = range(-2, 21), [-(2**31), 2**31 - 1, 127, 128]
_LONG_EDGES = [-(2**63), 2**63 - 1, 2**40]
_FLOATS = [0.0, 1.0, 1e-4, -1.0, 0.5, 1e38, 1e-45, float("nan"), float("inf"), float("-inf")]


def path_of(method: MethodDescriptor) -> str:
    """How gRPC names it."""
    return f"/{method.containing_service.full_name}/{method.name}"


def message(random: Random, kind: Descriptor, session: str, depth: int = 0) -> Message:
    """A message of this kind, with some of its fields set to something.

    Args:
        random: draws.
        kind: of the message.
        session: a live session's id, which half of the fields of that name get.
        depth: of the message inside the request.
    """
    made = GetMessageClass(kind)()
    for field in kind.fields:
        if field.name == "session_id":
            made.session_id = random.choice([session, session, "", "x"])  # type: ignore[attr-defined]
        elif depth < DEPTH and random.randrange(4):
            _fill(random, made, field, session, depth)
    return made


def _fill(random: Random, made: Message, field: FieldDescriptor, session: str, depth: int) -> None:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        key, value = inner.fields_by_name["key"], inner.fields_by_name["value"]
        getattr(made, field.name)[KINDS[key.type](random)] = KINDS[value.type](random)
    elif inner is not None:
        for _ in range(random.randint(1, 2) if field.is_repeated else 1):
            there = getattr(made, field.name).add() if field.is_repeated else getattr(made, field.name)
            there.CopyFrom(message(random, inner, session, depth + 1))
    elif field.is_repeated:
        getattr(made, field.name).extend(KINDS[field.type](random) for _ in range(random.randint(0, 3)))
    else:
        setattr(made, field.name, KINDS[field.type](random))


def _integer(random: Random) -> int:
    return random.choice(_EDGES) if random.random() < 0.2 else random.choice(_SMALL)


def _long(random: Random) -> int:
    return random.choice(_LONG_EDGES) if random.random() < 0.2 else _integer(random)


def _float(random: Random) -> float:
    return random.choice(_FLOATS) if random.random() < 0.6 else random.uniform(-10, 10)


def _text(random: Random) -> str:
    if random.random() < 0.6:
        return random.choice(NAMES)
    return "".join(chr(random.choice([*range(32, 127), 0x301, 0x202E, 0x1F600])) for _ in range(random.randint(0, 8)))


def _bytes(random: Random) -> bytes:
    return struct.pack("<3i", 5, 6, 7) if random.random() < 0.5 else random.randbytes(random.randint(0, 24))


KINDS: dict[int, Callable[[Random], Any]] = {
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_BYTES: _bytes,
    FieldDescriptor.TYPE_BOOL: lambda random: random.random() < 0.5,
    FieldDescriptor.TYPE_FLOAT: _float,
    FieldDescriptor.TYPE_DOUBLE: _float,
    FieldDescriptor.TYPE_ENUM: lambda random: random.randint(-1, 8),
    FieldDescriptor.TYPE_INT32: _integer,
    FieldDescriptor.TYPE_INT64: _long,
}


# ------------------------------------------------------------------------------------------------ bytes


def varint(number: int) -> bytes:
    """As protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _flip(random: Random, raw: bytearray) -> None:
    for _ in range(random.randint(1, 4)):
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)


def _overwrite(random: Random, raw: bytearray) -> None:
    """A byte that may be a tag, a type, or a length."""
    raw[random.randrange(len(raw))] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)])


def _truncate(random: Random, raw: bytearray) -> None:
    del raw[random.randrange(len(raw)) :]


def _drop(random: Random, raw: bytearray) -> None:
    begin = random.randrange(len(raw))
    del raw[begin : begin + random.randint(1, 8)]


def _repeat(random: Random, raw: bytearray) -> None:
    """Fields twice, or a piece of one."""
    begin = 0 if random.random() < 0.5 else random.randrange(len(raw))
    raw += raw[begin:]


def _insert(random: Random, raw: bytearray) -> None:
    place = random.randrange(len(raw))
    raw[place:place] = random.randbytes(random.randint(1, 8))


def _huge_varint(random: Random, raw: bytearray) -> None:
    place = random.randrange(len(raw))
    raw[place:place] = random.choice([b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 12, varint(2**63), varint(2**32)])


def _unknown_field(random: Random, raw: bytearray) -> None:
    number, kind = random.choice([99, 2**20, 2**29 - 1, 0]), random.randrange(8)
    raw += varint(number << 3 | kind) + random.randbytes(random.randint(0, 12))


def _length_lie(random: Random, raw: bytearray) -> None:
    """A field that says it is longer than what is there."""
    raw += varint(random.randint(1, 12) << 3 | 2) + varint(random.choice([1, 100, 2**20, 2**31, 2**63]))


def _deep(random: Random, raw: bytearray) -> None:
    """Messages in messages, or groups in groups."""
    number, depth = random.randint(1, 12), random.choice([50, 99, 101, 300, 2000])
    if random.random() < 0.3:
        raw += varint(number << 3 | 3) * depth
        return
    inner = bytes(raw[:64])
    for _ in range(depth):
        inner = varint(number << 3 | 2) + varint(len(inner)) + inner
    raw[:] = inner


def _wrong_type(random: Random, raw: bytearray) -> None:
    raw[0] = raw[0] & 0xF8 | random.randrange(8)


SPOILS = (
    _flip, _flip, _overwrite, _overwrite, _truncate, _drop, _repeat, _insert, _huge_varint, _unknown_field, _length_lie,
    _deep, _wrong_type,
)  # fmt: skip


def spoiled(random: Random, raw: bytes) -> bytes:
    """These bytes with one to three faults."""
    found = bytearray(raw)
    for _ in range(random.randint(1, 3)):
        if found:
            random.choice(SPOILS)(random, found)
    return bytes(found)


def request(random: Random, method: MethodDescriptor, session: str, valid: list[bytes]) -> bytes:
    """An input of a method: a random message, a valid or random one with faults, or bytes that are none.

    One valid request in five stays as it is: the others are to meet a server in which something happens.

    Args:
        random: draws.
        method: whose request it is like.
        session: a live session's id.
        valid: requests of the method that are carried out as they are.
    """
    kind = random.random()
    if kind < 0.1:
        return random.randbytes(random.randint(0, 64))
    if valid and kind < 0.5:
        whole = random.choice(valid)
        return whole if kind < 0.18 else spoiled(random, whole)
    raw = message(random, method.input_type, session).SerializeToString()
    return raw if kind < 0.85 else spoiled(random, raw)
