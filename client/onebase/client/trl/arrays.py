"""Arrays in and out: torch tensors where torch is installed, numpy arrays where it is not; padded batches as rows."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any
"""A torch tensor or a numpy array."""


@functools.cache
def torch() -> Any:
    """The torch module, or None where it is not installed."""
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def to_numpy(values: Any) -> NDArray[Any]:
    """A tensor, an array or a list as a numpy array; gradients and devices are left behind."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":  # numpy has none
            values = values.float()
    return np.asarray(values)


def give(array: NDArray[Any], like: Any = None) -> Array:
    """An array for the caller: a tensor on the device of `like`, or numpy where there is no torch."""
    module = torch()
    if module is None:
        return array
    tensor = module.from_numpy(np.array(array))  # a copy: what the client gives is read-only
    device = getattr(like, "device", None)
    return tensor if device is None or isinstance(like, np.ndarray) else tensor.to(device)


def draw_seed() -> int:
    """A seed out of the global random state, so that a script that seeds it repeats itself."""
    module = torch()
    if module is None:
        return int(np.random.randint(2**31))
    return int(module.randint(2**31, ()).item())


@dataclass(frozen=True)
class Batch:
    """A padded batch as its rows of real tokens."""

    rows: SequenceABC[NDArray[np.int64]]
    starts: SequenceABC[int]
    """Columns of padding in front of each row."""
    width: int
    like: Any
    """What was given, for its device."""

    def padded(self, numbers: SequenceABC[NDArray[Any]], *, hold_last: bool = False) -> Array:
        """One number (or vector) for every real token, as the batch was padded: zeros elsewhere.

        Args:
            numbers: an array [length of the row, ...] for each row.
            hold_last: repeat the row's last number behind it, so that [:, -1] is that of the last real token.
        """
        rest = numbers[0].shape[1:]
        whole = np.zeros((len(self.rows), self.width, *rest), dtype=np.float32)
        for line, row, start in zip(whole, numbers, self.starts, strict=True):
            line[start : start + len(row)] = row
            if hold_last:
                line[start + len(row) :] = row[-1]
        return give(whole, self.like)


def read_batch(input_ids: Any, attention_mask: Any = None) -> Batch:
    """Takes a padded batch [B, T] and its mask apart; without a mask every token is real.

    Raises:
        ValueError: shapes that do not fit, a row without a token, or a mask with a hole.
    """
    ids = to_numpy(input_ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"input_ids has shape {list(ids.shape)}; give a batch [B, T]")
    mask = np.ones(ids.shape, bool) if attention_mask is None else to_numpy(attention_mask).astype(bool)
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, and input_ids {list(ids.shape)}")
    rows, starts = [], []
    for index, (line, real) in enumerate(zip(ids, mask, strict=True)):
        places = np.flatnonzero(real)
        if not places.size:
            raise ValueError(f"attention_mask[{index}] masks every token; a row has at least one")
        first, last = int(places[0]), int(places[-1])
        if places.size != last - first + 1:
            raise ValueError(f"attention_mask[{index}] has a hole; pad on the left or on the right only")
        rows.append(line[first : last + 1].astype(np.int64))
        starts.append(first)
    return Batch(rows, starts, ids.shape[1], input_ids)


def pad_rows(rows: SequenceABC[NDArray[np.integer[Any]]], pad_id: int, like: Any) -> Array:
    """Token ids stacked into [B, longest], padded on the right."""
    whole = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for line, row in zip(whole, rows, strict=True):
        line[: len(row)] = row
    return give(whole, like)


Sampler: TypeAlias = Callable[[], int]
"""Draws a number of tokens to write."""
