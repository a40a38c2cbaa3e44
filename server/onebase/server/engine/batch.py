"""One flat batch: rows of any adapters, laid end to end, with everything the modules need to find their part.

A row is a run of tokens of one sequence under one adapter: a prompt to prefill, one token to decode, a sequence to
score or to train on. The rows of a step are sorted by adapter and concatenated into one sequence of N tokens without
padding, so that every linear layer of the base sees one matrix (1, N, ·), and each adapter one contiguous slice.

This module knows nothing of models: it turns rows into index tensors. `Route` is where the modules of the base read
the batch they are in; it holds one batch at a time and is owned by the one thread that runs the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Weights
    from onebase.server.engine.kv import KVCache
    from onebase.server.engine.segmented import SegmentedStep
    from onebase.server.engine.stacks import SegmentGroup

MIN_ROWS = 4
"""Matrix products of fewer rows take another path in the CPU's BLAS and round otherwise; so none has fewer."""

KV_BLOCK = 16
"""Lengths that attention sums over are padded to a multiple of this, so that cached and fresh sums round alike."""


MAX_SCORES = 2**22
"""Most attention scores of one head that are held at once for a group of rows."""

VECTOR = 64
"""Elementwise kernels work on this many elements at a time, and round the rest of an array otherwise."""


def row_multiple(widths: Iterable[int]) -> int:
    """What the number of rows must be a multiple of, so that no array of these widths has a rest; 1 for most models."""
    return max((VECTOR // math.gcd(VECTOR, width) for width in widths), default=1)


def padded(length: int) -> int:
    """The length, rounded up to KV_BLOCK."""
    return -(-length // KV_BLOCK) * KV_BLOCK


@dataclass(eq=False)
class Row:
    """A run of tokens of one sequence under one adapter.

    `past` tokens of the sequence are in the KV cache's `slot` already; a row without a slot leaves nothing behind.
    """

    weights: Weights | None  # None is the base
    tokens: Sequence[int]
    past: int = 0
    slot: int | None = None
    start: int = field(default=0, init=False)  # its place in the flat batch, set by flatten()

    @property
    def stop(self) -> int:
        """One past its last place in the flat batch."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of one adapter: flat places [start, stop)."""

    weights: Weights
    start: int
    stop: int


@dataclass(frozen=True)
class FreshGroup:
    """Rows of one padded length P that begin their sequences, n of them with t tokens in all."""

    gather: torch.Tensor  # [n, P] flat places; any place where a row has ended
    flat: torch.Tensor  # [t] flat places of the real tokens, row by row
    real: torch.Tensor  # [t] the same in n * P


@dataclass(frozen=True)
class DecodeBatch:
    """Single tokens with a past in the cache, in the order of their slots."""

    index: torch.Tensor  # [B] flat places
    slots: torch.Tensor  # [B]
    first_slot: int | None  # set where the slots are neighbours, so that the cache can be read in place
    lengths: torch.Tensor  # [B] tokens to attend to, the new one included
    span: int  # the longest of them, padded


@dataclass(frozen=True)
class Batch:
    """Rows, flattened. N counts the padding that fills it up."""

    rows: tuple[Row, ...]
    input_ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [1, N]
    segments: tuple[Segment, ...]
    fresh: tuple[FreshGroup, ...]  # rows that attend to themselves alone
    chunks: tuple[Row, ...]  # rows of several tokens with a past
    decode: DecodeBatch | None
    size: int  # N


class Route:
    """Where the base's modules find the batch of the step; empty between steps."""

    def __init__(self, *, exact: bool = False, wide: bool = False) -> None:
        self.exact = exact  # attention by products that round alike; fused kernels otherwise
        self.wide = wide  # products in float32 whatever the base's dtype (see `precision`)
        self.batch: Batch | None = None
        self.kv: KVCache | None = None
        self.groups: tuple[SegmentGroup, ...] = ()  # the adapters' slices of the current batch, for torch
        self.segmented: SegmentedStep | None = None  # the same for the kernels, instead
        self._memo: dict[Hashable, torch.Tensor] = {}

    def begin(
        self,
        batch: Batch,
        kv: KVCache,
        groups: tuple[SegmentGroup, ...] = (),
        segmented: SegmentedStep | None = None,
    ) -> None:
        """Shows the modules a batch; its adapters' slices either as torch wants them or as the kernels do."""
        self.batch, self.kv, self.groups, self.segmented = batch, kv, groups, segmented

    def end(self) -> None:
        """Shows them nothing any more."""
        self.batch, self.kv, self.groups, self.segmented = None, None, (), None
        self._memo.clear()

    def remember(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor that many layers of one step need: made by the first of them."""
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = make()
        return found


def flatten(rows: Sequence[Row], device: torch.device, multiple: int = 1) -> Batch:
    """Lays rows end to end, sorted by adapter (the base first), and notes where everything is.

    Args:
        rows: in any order; each learns its place.
        device: where the index tensors go.
        multiple: what the number of flat places must be a multiple of (see `row_multiple`).
    """
    ordered = sorted(rows, key=lambda row: 0 if row.weights is None else row.weights.serial)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for row in ordered:
        row.start = len(ids)
        ids.extend(row.tokens)
        positions.extend(range(row.past, row.past + len(row.tokens)))
        if row.weights is None:
            continue
        if segments and segments[-1].weights is row.weights:
            segments[-1] = Segment(row.weights, segments[-1].start, row.stop)
        else:
            segments.append(Segment(row.weights, row.start, row.stop))
    fill = max(MIN_ROWS, -(-len(ids) // multiple) * multiple) - len(ids)
    ids.extend([0] * fill)
    positions.extend([0] * fill)
    return Batch(
        rows=tuple(ordered),
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        segments=tuple(segments),
        fresh=_fresh_groups([row for row in ordered if row.past == 0], device),
        chunks=tuple(row for row in ordered if row.past > 0 and len(row.tokens) > 1),
        decode=_decode_batch([row for row in ordered if row.past > 0 and len(row.tokens) == 1], device),
        size=len(ids),
    )


def _fresh_groups(rows: Sequence[Row], device: torch.device) -> tuple[FreshGroup, ...]:
    by_length: dict[int, list[list[Row]]] = {}
    for row in rows:
        length = padded(len(row.tokens))
        groups = by_length.setdefault(length, [[]])
        if (len(groups[-1]) + 1) * length * length > MAX_SCORES:
            groups.append([])
        groups[-1].append(row)
    return tuple(
        _fresh_group(group, length, device) for length, groups in by_length.items() for group in groups if group
    )


def _fresh_group(rows: Sequence[Row], length: int, device: torch.device) -> FreshGroup:
    starts = torch.tensor([row.start for row in rows])[:, None]
    counts = torch.tensor([len(row.tokens) for row in rows])[:, None]
    place = torch.arange(length)[None]
    gather = starts + torch.minimum(place, counts - 1)
    real = (place < counts).view(-1).nonzero()[:, 0]
    return FreshGroup(gather.to(device), gather.view(-1)[real].to(device), real.to(device))


def _decode_batch(rows: Sequence[Row], device: torch.device) -> DecodeBatch | None:
    if not rows:
        return None
    by_slot = sorted(((row.slot, row) for row in rows if row.slot is not None), key=lambda pair: pair[0])
    if len(by_slot) != len(rows):
        raise ValueError("a row with a past needs a slot")
    slots = [slot for slot, _ in by_slot]
    lengths = [row.past + 1 for _, row in by_slot]
    return DecodeBatch(
        index=torch.tensor([row.start for _, row in by_slot], device=device),
        slots=torch.tensor(slots, device=device),
        first_slot=slots[0] if slots[-1] - slots[0] + 1 == len(slots) else None,
        lengths=torch.tensor(lengths, device=device),
        span=padded(max(lengths)),
    )
