"""Adapters' directories with faults in their files: lying headers, offsets, shapes, types and lengths; spoiled JSON."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

Files = dict[str, bytes]

_NUMBERS = [0, 1, -1, 2, 8, 100, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, 2**100, 1e308, 0.5, -0.0]
_OTHERS: list[Any] = [None, True, "", "x", "all-linear", "../x", "\0", [], {}, [[]], {"x": 1}, "é" * 50, "a" * 5000]
_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "X9", "", None, 5]
_LENGTHS = [0, 1, 2**20, 100 * 2**20, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


def spoiled_directory(random: Random, files: Files) -> Files:
    """The same files, one or two of them with a fault, one more, or one less.

    Args:
        random: draws.
        files: a whole adapter's, by name.
    """
    found = dict(files)
    for name in random.sample(sorted(found), min(len(found), random.choice([1, 1, 1, 2]))):
        if random.random() < 0.03:
            del found[name]
        elif name.endswith(".json"):
            found[name] = spoiled_json(random, found[name])
        else:
            found[name] = spoiled_tensors(random, found[name])
    return found


def spoiled_json(random: Random, data: bytes) -> bytes:
    """A JSON file with a fault in its bytes, its shape, or its values."""
    kind = random.random()
    if kind < 0.25:
        return spoiled_bytes(random, data)
    if kind < 0.3:
        depth = random.choice([10, 900, 1100, 100_000])
        return random.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])
    return _dumped(random, _changed(random, json.loads(data)))


def spoiled_tensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with a fault."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    match random.randrange(8):
        case 0:
            return spoiled_bytes(random, data)
        case 1:
            return spoiled_bytes(random, data[: 8 + length]) + body
        case 2:  # a length that lies
            lie = random.choice([*_LENGTHS, length - 1, length + 1, len(data)])
            return struct.pack("<Q", lie) + data[8:]
        case 3:
            return data[: random.randrange(len(data))] if random.random() < 0.7 else data + random.randbytes(8)
        case 4:  # the same key twice
            text = json.dumps(header)
            key = random.choice(sorted(header))
            text = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
            return _tensors(text.encode(), body)
        case 5:
            return _tensors(_dumped(random, _changed(random, header)), body)
        case _:
            key = random.choice([key for key in header if key != "__metadata__"])
            _lie(random, header, key, len(body))
            return _tensors(json.dumps(header).encode(), body)


def _lie(random: Random, header: dict[str, Any], key: str, size: int) -> None:
    """One tensor says something else than what is there."""
    tensor = header[key]
    match random.randrange(6):
        case 0:
            tensor["dtype"] = random.choice(_DTYPES)
        case 1:
            tensor["shape"] = [random.choice(_NUMBERS) for _ in range(random.randint(0, 4))]
        case 2:
            edges = [0, 4, size, size + 1, size - 4, 2**63, -1, *tensor["data_offsets"]]
            tensor["data_offsets"] = [random.choice(edges), random.choice(edges)]
        case 3:
            header[random.choice(["x", "", "base_model.model.score.weight", key + ".x", "__metadata__"])] = tensor
        case 4:  # many dimensions, whose product is what is there
            tensor["shape"] = [1] * random.choice([5, 64, 5000]) + tensor["shape"]
        case _:
            header[random.choice(sorted(header))] = header.pop(key)


def spoiled_bytes(random: Random, data: bytes) -> bytes:
    """Some bytes changed, more often near the beginning, where lengths, names and shapes are; sometimes cut off."""
    whole = bytearray(data)
    for _ in range(random.randint(1, 4)):
        near = random.random() < 0.6
        if whole:
            whole[random.randrange(min(len(whole), 400) if near else len(whole))] = random.randrange(256)
    return bytes(whole[: random.randint(0, len(whole))] if random.random() < 0.3 else whole)


def _changed(random: Random, value: Any) -> Any:
    """A JSON value with something inside it put, taken away, or of another kind."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        found = dict(value)
        match random.randrange(6):
            case 0:
                del found[key]
            case 1:
                found[random.choice(["x", "", "rank_pattern", "alpha_pattern", key + key])] = _value(random)
            case _:
                found[key] = _changed(random, found[key])
        return found
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        return [*value[:place], _changed(random, value[place]), *value[place + random.randint(0, 1) :]]
    return _value(random)


def _value(random: Random) -> Any:
    return random.choice(_NUMBERS) if random.random() < 0.5 else random.choice(_OTHERS)


def _dumped(random: Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.05:
        text = text.replace("0.5", random.choice(["NaN", "Infinity", "1e999", "0x10"]))
    return text.encode("utf-16" if random.random() < 0.02 else "utf-8")


def _tensors(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body
