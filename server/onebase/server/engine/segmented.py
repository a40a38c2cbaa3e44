"""The adapters' part of a step by the Triton kernels, where nothing is recorded for gradients (see `kernels`).

The kernels read an adapter's tensors where they are. Where that is, is noted once per version of an adapter: a step in
place changes numbers, not addresses, and a step into a copy makes a `Weights` of its own. The note goes when its
`Weights` goes, so no address outlives its tensor. A step stacks the notes of its adapters, for all layers at once, and
steps of the same adapters share the stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from onebase.server.engine.kernels import AdapterEntries, LoraTables, Tiles, add_lora

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Weights
    from onebase.server.engine.batch import Segment


@dataclass(frozen=True)
class SegmentedStep:
    """What every layer of one step shares."""

    tables: LoraTables
    tiles: Tiles

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the adapters' updates of a layer to y, in place.

        Args:
            name: the layer's.
            x: [N, in].
            y: [N, out], rows contiguous.
        """
        table = self.tables.layer(name)
        if table is not None:
            add_lora(x if x.stride(1) == 1 else x.contiguous(), y, table, self.tiles)


class SegmentedLora:
    """Makes the steps.

    Args:
        shapes: (in, out) of every layer that an adapter may change, by name.
        device: where the adapters are.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self._shapes = shapes
        self._device = device
        self._notes: WeakKeyDictionary[Weights, AdapterEntries] = WeakKeyDictionary()
        self._tables: LoraTables | None = None  # of the last step

    def step(self, segments: Sequence[Segment]) -> SegmentedStep | None:
        """For a batch with these segments; None where no row has an adapter."""
        if not segments:
            return None
        adapters = tuple(self._note(segment.weights) for segment in segments)
        if self._tables is None or self._tables.adapters != adapters:
            self._tables = LoraTables(adapters, kernel=True)
        bounds = [(segment.start, segment.stop) for segment in segments]
        return SegmentedStep(self._tables, Tiles.of(bounds, self._device))

    def drop(self) -> None:
        """Forgets the last step's adapters, which it would keep alive."""
        self._tables = None

    def _note(self, weights: Weights) -> AdapterEntries:
        note = self._notes.get(weights)
        if note is None:
            note = self._notes[weights] = AdapterEntries(weights.lora, self._shapes, self._device)
        return note
