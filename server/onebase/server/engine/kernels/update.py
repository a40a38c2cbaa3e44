"""One call for a layer: the kernel where there is one, plain torch otherwise; in place, or recorded for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from onebase.server.engine.kernels import reference
from onebase.server.engine.kernels.table import LoraTable, Tiles


def add_lora(x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles) -> torch.Tensor:
    """y[n] + scaling · (x[n] · Aᵀ) · Bᵀ, with the A and B of row n's adapter; rows without one are y's, bit for bit.

    Args:
        x: [N, in], rows contiguous.
        y: [N, out], what the base made of x; rows contiguous. Overwritten, unless gradients are recorded.
        table: the layer's adapters (see `LoraTables.layer`).
        tiles: which rows are whose; adapters in the table's order.

    Returns:
        y itself, or a new tensor where gradients are recorded: they flow to x, y and the adapters' parameters.

    Raises:
        ValueError: if shapes, dtypes or layouts do not fit the table or the tiles.
    """
    _check(x, y, table, tiles)
    if torch.is_grad_enabled():
        parameters = [tensor for pair in table.pairs if pair is not None for tensor in (pair.a, pair.b)]
        if any(tensor.requires_grad for tensor in (x, y, *parameters)):
            updated: torch.Tensor = _Recorded.apply(x, y, table, tiles, *parameters)  # type: ignore[no-untyped-call]
            return updated
    _add_(x, y, table, tiles)
    return y


def _add_(x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles) -> None:
    if not table.kernel:
        reference.add_lora_(x, y, table, tiles)
        return
    from onebase.server.engine.kernels import segmented_lora  # imports Triton, which not every machine has

    segmented_lora.add_lora_(x, y, table, tiles)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.table, ctx.tiles = table, tiles
        updated = y.clone()
        _add_(x, updated, table, tiles)
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, *parameters = ctx.saved_tensors
        by_x, by_parameters = reference.gradients(grad, x, parameters, ctx.table, ctx.tiles)
        return by_x, grad, None, None, *by_parameters


def _check(x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != table.in_features or y.shape[1] != table.out_features:
        wanted = f"(N, {table.in_features}) and (N, {table.out_features})"
        raise ValueError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}, not {wanted}")
    if x.shape[0] != y.shape[0] or tiles.stop > x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and y {y.shape[0]}; the segments end at {tiles.stop}")
    if len(tiles.bounds) != len(table.pairs):
        raise ValueError(f"{len(tiles.bounds)} segments for {len(table.pairs)} adapters")
    if x.dtype != table.launch.dtype or y.dtype != table.launch.dtype:
        raise ValueError(f"x is {x.dtype} and y {y.dtype}, not {table.launch.dtype} as the adapters")
    if x.device != table.entries.device or y.device != table.entries.device:
        raise ValueError(f"x is on {x.device} and y on {y.device}, not on {table.entries.device} as the adapters")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"the rows of x and y must be contiguous: their strides are {x.stride()} and {y.stride()}")
