"""The segmented low-rank update in plain torch: what the kernel must give, what runs where it cannot, and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onebase.server.engine.kernels.table import LoraTable, Pair, Tiles


def add_lora_(x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles) -> None:
    """Adds each adapter's update to its rows of y, in place, one adapter after another (see `update.add_lora`)."""
    for _, pair, start, stop in segments(table, tiles):
        low = torch.mm(x[start:stop], pair.compute_a.t()).mul_(pair.scaling)
        y[start:stop].addmm_(low, pair.compute_b.t())


def gradients(
    grad: torch.Tensor, x: torch.Tensor, parameters: Sequence[torch.Tensor], table: LoraTable, tiles: Tiles
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """What flows back through the update, each adapter's by products over its own rows alone.

    Args:
        grad: [N, out], the gradient of the loss by the updated y.
        x: [N, in].
        parameters: A and B of each adapter that has a pair, in the table's order.
        table: the layer's adapters.
        tiles: the batch's rows.

    Returns:
        The gradients by x ([N, in]; zeros where a row has no adapter) and by the parameters, None where an adapter has
        no rows.
    """
    by_x = torch.zeros_like(x)
    by_parameters: list[torch.Tensor | None] = [None] * len(parameters)
    for at, pair, start, stop in segments(table, tiles):
        a, b = parameters[2 * at], parameters[2 * at + 1]
        compute_a, compute_b = a.to(x.dtype), b.to(x.dtype)
        own, out = x[start:stop], grad[start:stop]
        by_low = torch.mm(out, compute_b) * pair.scaling
        low = torch.mm(own, compute_a.t()) * pair.scaling
        torch.mm(by_low, compute_a, out=by_x[start:stop])
        by_parameters[2 * at] = torch.mm(by_low.t(), own).to(a.dtype)
        by_parameters[2 * at + 1] = torch.mm(out.t(), low).to(b.dtype)
    return by_x, by_parameters


def segments(table: LoraTable, tiles: Tiles) -> Iterator[tuple[int, Pair, int, int]]:
    """(place among the adapters that have a pair, pair, start, stop) of those that have rows."""
    there = [(pair, bounds) for pair, bounds in zip(table.pairs, tiles.bounds, strict=True) if pair is not None]
    for at, (pair, (start, stop)) in enumerate(there):
        if stop > start:
            yield at, pair, start, stop
