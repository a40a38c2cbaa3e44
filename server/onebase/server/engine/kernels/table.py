"""What the segmented kernel reads beside the activations: where the adapters' tensors lie, and whose the rows are.

All are small index tensors. `AdapterEntries` depends on one adapter and lasts as long as it does;
`LoraTables` stacks those of the adapters in a step; `Tiles` depends on how many rows each has, and every layer shares
it. Nothing of an adapter is copied: its own A and B are read where they are, at their own rank, so entries stay right
while their numbers change in place.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
from torch import nn

from onebase.server.engine.kernels.availability import available

SMALL_TILE = 16
"""Rows of a tile of a segment with few rows: the least that a tensor core multiplies."""

LARGE_TILE = 64
"""Rows of a tile of a segment with many rows."""

FIELDS = 4
"""Numbers of one entry: A's address, B's address, the rank, the bits of the scaling as float32."""

_LEAST_RANK_BLOCK = 16
_RANK_BLOCK_BYTES = 256
_VECTOR_BYTES = 16


class Pair(Protocol):
    """One layer's update of one adapter, scaling · B · A (see `lora.LoraPair`)."""

    @property
    def a(self) -> torch.Tensor:
        """[r, in], the parameter."""

    @property
    def b(self) -> torch.Tensor:
        """[out, r], the parameter."""

    @property
    def scaling(self) -> float:
        """What the product is multiplied by."""

    @property
    def compute_a(self) -> torch.Tensor:
        """[r, in] in the dtype of the activations."""

    @property
    def compute_b(self) -> torch.Tensor:
        """[out, r] in the dtype of the activations."""


@dataclass(frozen=True)
class Launch:
    """What the kernels are compiled for, beside a layer's shape; equal for all layers of one set of adapters."""

    dtype: torch.dtype
    rank_block: int  # ranks of one product, a power of two up to 128 (64 in float32); larger ranks take several
    rank_multiple: int  # divides every rank; lets rows of B be read 16 bytes at a time
    aligned: bool  # every A and B begins at a multiple of 16 bytes


@dataclass(frozen=True)
class LoraTable:
    """One layer of several adapters.

    Attributes:
        pairs: the adapters' pairs in the order of `Tiles.bounds`; None for one that leaves the layer alone. They are
            held here so that the addresses stay valid.
        entries: [adapters, FIELDS] int64 on the device; rank 0 where there is no pair.
        launch: what the kernels are compiled for.
        in_features, out_features: the layer's.
        width: columns of the low-rank products, a multiple of `launch.rank_block`.
        kernel: whether the kernel makes the update, or plain torch.
    """

    pairs: tuple[Pair | None, ...]
    entries: torch.Tensor
    launch: Launch
    in_features: int
    out_features: int
    width: int
    kernel: bool


class AdapterEntries:
    """Where one adapter's tensors lie, for every layer of a base. Made once, and right for as long as the pairs live.

    Args:
        pairs: the adapter's, by layer.
        shapes: (in, out) of every layer of the base, by name; one mapping for all adapters.
        device: where the entries go; the pairs must be there already.

    Raises:
        ValueError: if a pair does not fit its layer, differs from the first in dtype, lies on another device or is not
            contiguous; it names the layer.
    """

    def __init__(self, pairs: Mapping[str, Pair], shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.pairs = pairs
        self.shapes = shapes
        there = list(pairs.values())
        tensors = [tensor for pair in there for tensor in (pair.compute_a, pair.compute_b)]
        self.dtype = tensors[0].dtype if tensors else None
        self.ranks = frozenset(pair.a.shape[0] for pair in there)
        self.aligned = all(tensor.data_ptr() % _VECTOR_BYTES == 0 for tensor in tensors)
        rows = [_entry(pairs.get(name)) for name in shapes]
        self.rows = torch.tensor(rows, dtype=torch.int64).view(len(shapes), FIELDS).to(device)  # in the layers' order
        for name, pair in pairs.items():
            if name not in shapes:
                raise ValueError(f"layer {name!r} is none of the base's")
            _check(name, pair, shapes[name], self.dtype, self.rows.device)


class LoraTables:
    """The tables of all layers for one set of adapters, stacked on the device.

    A CUDA graph captured with `capacity` may be replayed for other adapters: where `launch` and `width` are equal,
    copy the `entries` of the new tables into the captured ones, and keep the new ones for as long.

    Args:
        adapters: one or more, in the order of the segments (and of `Tiles.bounds`).
        capacity: adapters that the entries have room for; by default as many as there are.
        kernel: whether the kernel is to be used; by default, where it is `available`.

    Raises:
        ValueError: if the adapters are of several bases or dtypes, or exceed the capacity.
    """

    def __init__(
        self, adapters: Sequence[AdapterEntries], *, capacity: int | None = None, kernel: bool | None = None
    ) -> None:
        self.adapters = tuple(adapters)
        self._shapes = adapters[0].shapes
        if any(one.shapes is not self._shapes for one in adapters):
            raise ValueError("adapters of several bases: make the entries of all with one mapping of shapes")
        room = len(adapters) if capacity is None else capacity
        if room < len(adapters):
            raise ValueError(f"{len(adapters)} adapters do not fit a capacity of {room}")
        entries = torch.stack([one.rows for one in adapters], dim=1)
        self.entries = nn.functional.pad(entries, (0, 0, 0, room - len(adapters)))  # [layers, room, FIELDS]
        self.launch = _launch(adapters)
        ranks = max((rank for one in adapters for rank in one.ranks), default=0)
        self.width = 0 if self.launch is None else _round_up(ranks, self.launch.rank_block)
        self._kernel = available(entries.device) if kernel is None else kernel
        self._places = {name: place for place, name in enumerate(self._shapes)}
        self._layers: dict[str, LoraTable | None] = {}

    def layer(self, name: str) -> LoraTable | None:
        """The table of a layer; None if no adapter has a pair for it."""
        if name not in self._layers:
            self._layers[name] = self._table(name)
        return self._layers[name]

    def _table(self, name: str) -> LoraTable | None:
        pairs = tuple(one.pairs.get(name) for one in self.adapters)
        if self.launch is None or all(pair is None for pair in pairs):
            return None
        in_features, out_features = self._shapes[name]
        entries = self.entries[self._places[name]]
        return LoraTable(pairs, entries, self.launch, in_features, out_features, self.width, self._kernel)


@dataclass(frozen=True)
class TileList:
    """Tiles of one size: the grid of one launch."""

    block: int  # most rows of a tile
    tiles: torch.Tensor  # [T, 3] int32 on the device: adapter, start, stop


@dataclass(frozen=True)
class Tiles:
    """The rows of a batch, cut into tiles, each of one adapter.

    Attributes:
        bounds: each adapter's flat places [start, stop), ascending; they may be empty.
        lists: tiles by size; no tile is empty, save those that fill a capacity.
    """

    bounds: tuple[tuple[int, int], ...]
    lists: tuple[TileList, ...]

    @classmethod
    def of(
        cls,
        bounds: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        exact: bool = False,
        capacity: int | None = None,
    ) -> Tiles:
        """Cuts rows into tiles.

        Args:
            bounds: each adapter's flat places [start, stop), in ascending order.
            device: where the tiles go.
            exact: the same tile size for every row, so that a row's numbers do not depend on how many rows its adapter
                has. Otherwise segments of few and of many rows take tiles of two sizes.
            capacity: pad to this many tiles, for a CUDA graph that is replayed with other tiles; implies `exact`.

        Raises:
            ValueError: if bounds overlap or descend, or their tiles exceed the capacity.
        """
        end = 0
        for start, stop in bounds:
            if start < end or stop < start:
                raise ValueError(f"segment [{start}, {stop}) begins before {end} or ends before it begins")
            end = stop
        cut: dict[int, list[tuple[int, int, int]]] = {}
        for adapter, (start, stop) in enumerate(bounds):
            few = exact or capacity is not None or stop - start <= SMALL_TILE
            block = SMALL_TILE if few else LARGE_TILE
            places = range(start, stop, block)
            cut.setdefault(block, []).extend((adapter, place, min(place + block, stop)) for place in places)
        if capacity is not None:
            tiles = cut.setdefault(SMALL_TILE, [])
            if len(tiles) > capacity:
                raise ValueError(f"{len(tiles)} tiles do not fit a capacity of {capacity}")
            tiles.extend([(0, 0, 0)] * (capacity - len(tiles)))
        lists = [
            TileList(block, torch.tensor(tiles, dtype=torch.int32).to(device)) for block, tiles in cut.items() if tiles
        ]
        return cls(tuple(bounds), tuple(lists))

    @property
    def stop(self) -> int:
        """One past the last place of any segment."""
        return self.bounds[-1][1] if self.bounds else 0


def _launch(adapters: Sequence[AdapterEntries]) -> Launch | None:
    there = [one for one in adapters if one.dtype is not None]
    dtypes = {one.dtype for one in there if one.dtype is not None}
    if len(dtypes) > 1:
        raise ValueError(f"adapters of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if not dtypes:
        return None
    (dtype,) = dtypes
    ranks = {rank for one in there for rank in one.ranks}
    block = 1 << (max(ranks) - 1).bit_length()
    return Launch(
        dtype=dtype,
        rank_block=min(max(block, _LEAST_RANK_BLOCK), _RANK_BLOCK_BYTES // dtype.itemsize),
        rank_multiple=gcd(_VECTOR_BYTES // dtype.itemsize, *ranks),
        aligned=all(one.aligned for one in there),
    )


def _entry(pair: Pair | None) -> list[int]:
    if pair is None:
        return [0] * FIELDS
    scaling: int = struct.unpack("<i", struct.pack("<f", pair.scaling))[0]
    return [pair.compute_a.data_ptr(), pair.compute_b.data_ptr(), pair.a.shape[0], scaling]


def _check(name: str, pair: Pair, shape: tuple[int, int], dtype: torch.dtype | None, device: torch.device) -> None:
    a, b = pair.compute_a, pair.compute_b
    rank, (in_features, out_features) = pair.a.shape[0], shape
    if a.shape != (rank, in_features) or b.shape != (out_features, rank):
        raise ValueError(
            f"layer {name!r}: A is {tuple(a.shape)} and B {tuple(b.shape)}, not {(rank, in_features)} and "
            f"{(out_features, rank)}"
        )
    for tensor in (a, b):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"layer {name!r}: a {tensor.dtype} on {tensor.device}, not {dtype} on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"layer {name!r}: a tensor of shape {tuple(tensor.shape)} is not contiguous")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
