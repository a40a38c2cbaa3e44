"""The segmented low-rank update in plain torch: what the kernel must give, what runs where it cannot, and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from onebase.server.engine.kernels.table import LoraTable, Pair, Tiles


def add_lora_(x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles) -> None:
    """Adds each adapter's update to its rows of y, in place, one adapter after another (see `add_lora`)."""
    for pair, (start, stop) in _segments(table, tiles):
        low = torch.mm(x[start:stop], pair.compute_a.t()).mul_(pair.scaling)
        y[start:stop].addmm_(low, pair.compute_b.t())


class SegmentedLora(torch.autograd.Function):
    """The update out of place, recorded for gradients: forward by the kernel where there is one, backward by torch.

    Each adapter's gradients are made of its own rows alone, by products of its own.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles, *_: torch.Tensor
    ) -> torch.Tensor:
        """x [N, in], y [N, out], and last every adapter's A and B, so that autograd knows them."""
        from onebase.server.engine.kernels import add_lora_

        ...
