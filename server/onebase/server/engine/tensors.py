"""The tensors of a safetensors file, looked at by name, shape and dtype before any is made.

A header of a few megabytes can name a million tensors of no bytes at all, each of which costs as much time as a large
one. So a header may be no longer than its adapter's own would be, and only what an adapter has is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from onebase.server.errors import FailedPrecondition, InvalidArgument

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
"""What tensors may be saved in; int64 is the number of an optimizer's steps."""
_HEADER, _PER_TENSOR = 2**20, 512
"""Bytes that a header may have, for what it says besides and for each tensor."""


class StoredTensors:
    """A file's tensors, each taken once.

    Args:
        path: the file.
        expected: how many tensors there are of such an adapter.

    Raises:
        InvalidArgument: BAD_SAFETENSORS: it is not a whole safetensors file, or its header is too long.
    """

    def __init__(self, path: Path, expected: int) -> None:
        self._path = path
        most = _HEADER + _PER_TENSOR * expected
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if most < length < path.stat().st_size:  # a longer one says itself that the file is cut off
                raise InvalidArgument(
                    "BAD_SAFETENSORS",
                    f"{path} has a header of {length} bytes, and {most} are the most for the {expected} tensors that "
                    "such an adapter has",
                    field="path",
                )
            self._file = cast(Any, safe_open(path, framework="pt"))
            self._left = set(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise self._bad(error) from error

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def left(self) -> list[str]:
        """The names of those that were not taken."""
        return sorted(self._left)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, as the header has it."""
        return tuple(self._file.get_slice(key).get_shape())

    def take(self, key: str, shape: tuple[int, ...], compute: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor that must be there, in this shape, and finite as a parameter and in what it is computed with.

        Raises:
            FailedPrecondition: MISSING_TENSOR, WRONG_BASE.
            InvalidArgument: BAD_DTYPE, NONFINITE_TENSOR.
        """
        if key not in self._left:
            raise FailedPrecondition(
                "MISSING_TENSOR",
                f"the adapter has no tensor {key!r}: was it trained on another architecture?",
                field="path",
            )
        found = self.shape(key)
        if found != shape:
            raise FailedPrecondition(
                "WRONG_BASE",
                f"tensor {key!r} has shape {found}, and this base needs {shape}: the adapter belongs to another base "
                "model",
                field="path",
            )
        self._left.discard(key)
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise self._bad(error) from error
        if tensor.dtype not in _DTYPES:
            raise InvalidArgument(
                "BAD_DTYPE",
                f"tensor {key!r} is of dtype {_name(tensor.dtype)}: save it as float32, bfloat16 or float16",
                field="path",
            )
        _check_finite(key, tensor, compute)
        return tensor

    def _bad(self, error: Exception) -> InvalidArgument:
        return InvalidArgument("BAD_SAFETENSORS", f"{self._path} cannot be read: {error}", field="path")


def _check_finite(key: str, tensor: torch.Tensor, compute: torch.dtype) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("NONFINITE_TENSOR", f"tensor {key!r} holds NaN or infinity", field="path")
    for dtype in (torch.float32, compute):  # a parameter, and what products are made of
        tensor = tensor.to(dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidArgument(
                "NONFINITE_TENSOR", f"tensor {key!r} holds numbers that are infinite in {_name(dtype)}", field="path"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
