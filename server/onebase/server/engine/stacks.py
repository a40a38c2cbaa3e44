"""Adapters side by side in one matrix, for steps in which each of several adapters has only a few rows.

Decoding, eight policies have a row or two each: sixteen small products a layer cost more than the base itself. So the
A of all of them are stacked to one matrix [R, in] and the B to one [out, R]; a row's low-rank numbers that belong to
other adapters are made zero:

    y += ((x · A_allᵀ) ∘ own) · B_allᵀ        own[i, j] = scaling of row i's adapter if column j is its, else 0

Zeros add nothing, so a row's numbers are, bit for bit, those it gets alone; unless they meet an infinity or a NaN in
another's B, so an adapter that has one there goes through the layers alone. A stack is a copy; it is kept while the
same versions go on decoding, and dropped with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from onebase.server.engine.batch import Segment

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Weights

RANK_BLOCK = 16
"""Ranks are padded to a multiple of this in products: narrower matrices round otherwise."""

MOST_ROWS = 16
"""Rows of one adapter above which a product of its own is cheaper."""

MOST_RANKS = 128
"""Ranks of one stack: a longer sum could be cut in two."""


def padded_rank(rank: int) -> int:
    """The rank, rounded up to RANK_BLOCK."""
    return -(-rank // RANK_BLOCK) * RANK_BLOCK


@dataclass(frozen=True)
class StackedPair:
    """One layer of several adapters."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [out, R]
    ranks: tuple[int, ...]  # padded, by adapter; 0 where an adapter leaves the layer alone
    scalings: tuple[float, ...]


class Stack:
    """Several adapters' layers side by side, made layer by layer as they are asked for."""

    def __init__(self, adapters: Sequence[Weights]) -> None:
        self._adapters = tuple(adapters)
        self._layers: dict[str, StackedPair | None] = {}

    def layer(self, name: str) -> StackedPair | None:
        """The adapters' pairs for a layer; None if none has one."""
        if name not in self._layers:
            self._layers[name] = self._make(name)
        return self._layers[name]

    def _make(self, name: str) -> StackedPair | None:
        pairs = [weights.lora.get(name) for weights in self._adapters]
        there = [pair for pair in pairs if pair is not None]
        if not there:
            return None
        ranks = tuple(0 if pair is None else padded_rank(pair.a.shape[0]) for pair in pairs)
        first = there[0].compute_a
        a = first.new_zeros(sum(ranks), first.shape[1])
        b = first.new_zeros(there[0].compute_b.shape[0], sum(ranks))
        at = 0
        for pair, rank in zip(pairs, ranks, strict=True):
            if pair is not None:
                own = pair.a.shape[0]
                a[at : at + own] = pair.compute_a
                b[:, at : at + own] = pair.compute_b
            at += rank
        return StackedPair(a, b, ranks, tuple(0.0 if pair is None else pair.scaling for pair in pairs))


@dataclass(frozen=True)
class SegmentGroup:
    """Neighbouring segments that go through the layers together: one alone, or several stacked."""

    start: int
    stop: int
    segments: tuple[Segment, ...]
    stack: Stack | None
    _owns: dict[tuple[tuple[int, ...], tuple[float, ...]], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )

    def own(self, pair: StackedPair) -> tuple[torch.Tensor, torch.Tensor]:
        """[stop - start, R]: each row's scaling in the columns of its adapter, 0 elsewhere; and where it is 0."""
        key = (pair.ranks, pair.scalings)
        if key not in self._owns:
            own = pair.a.new_zeros(self.stop - self.start, sum(pair.ranks))
            at = 0
            for segment, rank, scaling in zip(self.segments, pair.ranks, pair.scalings, strict=True):
                own[segment.start - self.start : segment.stop - self.start, at : at + rank] = scaling
                at += rank
            self._owns[key] = own, own == 0
        return self._owns[key]


class Stacks:
    """Groups the segments of batches, and keeps the stacks of those adapters that go on decoding together."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, int], ...], Stack] = {}
        self._finite: WeakKeyDictionary[Weights, tuple[int, bool]] = WeakKeyDictionary()  # by version

    def group(self, segments: Sequence[Segment]) -> tuple[SegmentGroup, ...]:
        """Segments in their order; few-rowed neighbours together. Stacks that this batch does not use are dropped."""
        runs: list[list[Segment]] = []
        for segment in segments:
            if runs and _fits(runs[-1], segment) and self._harmless(runs[-1][-1]) and self._harmless(segment):
                runs[-1].append(segment)
            else:
                runs.append([segment])
        kept: dict[tuple[tuple[int, int], ...], Stack] = {}
        groups = []
        for run in runs:
            stack = None
            if len(run) > 1 or _padded_anew(run[0]):
                key = tuple((segment.weights.serial, segment.weights.version) for segment in run)
                stack = kept[key] = self._kept.get(key) or Stack([segment.weights for segment in run])
            groups.append(SegmentGroup(run[0].start, run[-1].stop, tuple(run), stack))
        self._kept = kept
        return tuple(groups)

    def drop(self) -> None:
        """Forgets all stacks: nothing decodes any more."""
        self._kept = {}

    def _harmless(self, segment: Segment) -> bool:
        """Whether this adapter's numbers do nothing to others in a stack; looked at once per version."""
        weights = segment.weights
        version, finite = self._finite.get(weights, (-1, False))
        if version != weights.version:
            finite = _finite([pair.compute_b for pair in weights.lora.values()])
            self._finite[weights] = weights.version, finite
        return finite


def _finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all numbers are finite, in one answer of the device."""
    return not tensors or bool(torch.isfinite(torch.stack([t.abs().amax() for t in tensors])).all())


def _padded_anew(segment: Segment) -> bool:
    """Whether a product of its own would pad the adapter's matrices in every step."""
    rank = segment.weights.largest_rank
    return segment.stop - segment.start <= MOST_ROWS and padded_rank(rank) != rank <= MOST_RANKS


def _fits(run: Sequence[Segment], segment: Segment) -> bool:
    ranks = sum(padded_rank(one.weights.largest_rank) for one in (*run, segment))
    few = all(one.stop - one.start <= MOST_ROWS for one in (*run, segment))
    return few and ranks <= MOST_RANKS and run[-1].stop == segment.start
