"""Tensors: numpy arrays to bytes with shape and dtype, and back with every claim checked."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from onebase.server.errors import InvalidArgument
from onebase.server.jobs import Floats, Tokens
from onebase.v1 import types_pb2

_DTYPES: dict[int, tuple[str, np.dtype[np.generic]]] = {
    types_pb2.DTYPE_INT32: ("DTYPE_INT32", np.dtype("<i4")),
    types_pb2.DTYPE_INT64: ("DTYPE_INT64", np.dtype("<i8")),
    types_pb2.DTYPE_FLOAT32: ("DTYPE_FLOAT32", np.dtype("<f4")),
    types_pb2.DTYPE_FLOAT64: ("DTYPE_FLOAT64", np.dtype("<f8")),
    types_pb2.DTYPE_BOOL: ("DTYPE_BOOL", np.dtype("u1")),
}
_INTEGERS = (types_pb2.DTYPE_INT32, types_pb2.DTYPE_INT64)


def read_tokens(tensor: types_pb2.Tensor, field: str, vocab_size: int) -> Tokens:
    """Token ids, int64 [t], each a row of the embedding; t may be 0.

    Raises:
        InvalidArgument: BAD_TENSOR; BAD_TOKEN_ID.
    """
    tokens = _read(tensor, field, _INTEGERS).astype(np.int64)
    check_tokens(tokens, field, vocab_size)
    return tokens


def check_tokens(tokens: Tokens, field: str, vocab_size: int) -> None:
    """Refuses ids that the embedding has no row for.

    Raises:
        InvalidArgument: BAD_TOKEN_ID, with the first such id and its index.
    """
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if bad.size:
        raise InvalidArgument(
            "BAD_TOKEN_ID",
            f"{field} has id {tokens[bad[0]]} at index {bad[0]}: token ids of this base are 0 to {vocab_size - 1}",
            field=field,
        )


def read_floats(tensor: types_pb2.Tensor, field: str, length: int) -> Floats:
    """Finite numbers, float32 [length], in memory of their own.

    Raises:
        InvalidArgument: BAD_TENSOR; LENGTH_MISMATCH; NOT_FINITE.
    """
    floats = _read(tensor, field, (types_pb2.DTYPE_FLOAT32,)).astype(np.float32)
    _check_length(floats.size, field, length)
    bad = np.flatnonzero(~np.isfinite(floats))
    if bad.size:
        raise InvalidArgument(
            "NOT_FINITE", f"{field} has {floats[bad[0]]} at index {bad[0]}: every number must be finite", field=field
        )
    return floats


def read_mask(tensor: types_pb2.Tensor, field: str, length: int) -> NDArray[np.bool_]:
    """Which tokens count, bool [length], in memory of its own; at least one does.

    Raises:
        InvalidArgument: BAD_TENSOR; LENGTH_MISMATCH; EMPTY_MASK.
    """
    raw = _read(tensor, field, (types_pb2.DTYPE_BOOL,)).astype(np.uint8)
    _check_length(raw.size, field, length)
    bad = np.flatnonzero(raw > 1)
    if bad.size:
        raise InvalidArgument(
            "BAD_TENSOR", f"{field} has the byte {raw[bad[0]]} at index {bad[0]}: use 0 and 1", field=field
        )
    if not raw.any():
        raise InvalidArgument(
            "EMPTY_MASK", f"{field} selects none of its {length} tokens: leave the sequence out instead", field=field
        )
    return raw.astype(np.bool_)


def int_tensor(values: Tokens | Iterable[int]) -> types_pb2.Tensor:
    """Token ids as DTYPE_INT32 of shape [t]."""
    array = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype=np.int64)
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=array.shape, data=array.astype("<i4").tobytes())


def float_tensor(values: Floats | Iterable[float]) -> types_pb2.Tensor:
    """Numbers as DTYPE_FLOAT32 of the array's own shape."""
    array = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype=np.float32)
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes())


def _read(tensor: types_pb2.Tensor, field: str, wanted: tuple[int, ...]) -> NDArray[np.generic]:
    """A read-only view of the tensor's bytes as an array of one dimension."""
    if tensor.dtype not in wanted:
        names = " or ".join(_DTYPES[dtype][0] for dtype in wanted)
        given = _DTYPES[tensor.dtype][0] if tensor.dtype in _DTYPES else f"{tensor.dtype}, which is no dtype"
        raise InvalidArgument("BAD_TENSOR", f"{field} has dtype {given}: use {names}", field=field)
    shape = list(tensor.shape)
    if len(shape) != 1 or shape[0] < 0:
        raise InvalidArgument("BAD_TENSOR", f"{field} has shape {_shown(shape)}: use one dimension, [t]", field=field)
    name, dtype = _DTYPES[tensor.dtype]
    needed = math.prod(shape) * dtype.itemsize
    if len(tensor.data) != needed:
        raise InvalidArgument(
            "BAD_TENSOR",
            f"{field} has {len(tensor.data)} bytes of data: shape {shape} of {name} needs {needed}",
            field=field,
        )
    return np.frombuffer(tensor.data, dtype=dtype)


def _shown(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"{shape[:8]}… of {len(shape)} dimensions"


def _check_length(given: int, field: str, wanted: int) -> None:
    if given != wanted:
        raise InvalidArgument(
            "LENGTH_MISMATCH",
            f"{field} has {given} entries, and its completion has {wanted} tokens: give one entry per completion token",
            field=field,
        )
