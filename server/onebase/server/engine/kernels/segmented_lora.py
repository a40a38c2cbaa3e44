"""The segmented low-rank update in Triton: rows sorted by adapter, each adapter's A and B read where they are.

    shrink:  low[m] = x[m] · A[a(m)]ᵀ                     a partial sum for each part of the inputs
    expand:  y[m]  += scaling[a(m)] · low[m] · B[a(m)]ᵀ    the parts added in their order

A program handles one tile of rows of one adapter (see `table`), so no program is empty and rows without an adapter are
never touched. Long inputs are split over programs, because a decode step has too few tiles to fill a device; the parts
go to memory of their own instead of being added atomically, so the same batch gives the same bits. How inputs are
split depends on the layer and the tile's size alone, not on the batch.

Under Triton's interpreter (TRITON_INTERPRET=1) the same source runs on a CPU.

Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1; gathered pointers and the shrink/expand split as in
Punica, Chen et al. 2023 (arXiv:2310.18547), section 4. Unlike there, sums are not split atomically.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from onebase.server.engine.kernels.table import FIELDS, SMALL_TILE, LoraTable, TileList, Tiles


@dataclass(frozen=True)
class Blocks:
    """How one layer's work is cut, for tiles of one size."""

    inputs: int  # inputs of one product in shrink
    split: int  # programs that share the inputs of a tile
    outputs: int  # outputs of one program in expand
    warps: int
    stages: int  # loads of shrink in flight


def blocks_for(rows: int, table: LoraTable) -> Blocks:
    """The default cut for tiles of so many rows.

    A tile of few rows waits for memory: long rows of A at a time, and about four products to a program. A tile of many
    rows has company enough, so its inputs are split only where they are very long. `inputs` and `split`, the order in
    which sums are made, depend on the tile's rows and on the layer alone: not on the batch, and not on other adapters.
    """
    in_features, out_features = table.in_features, table.out_features
    itemsize = table.launch.dtype.itemsize
    rank_bytes = table.launch.rank_block * itemsize
    few = rows <= SMALL_TILE
    inputs = (256 if few else 128) // itemsize
    steps = -(-in_features // inputs)
    return Blocks(
        inputs=min(inputs, _block(in_features)),
        split=_power_below(steps // 4 if few else steps // 32, 16),
        outputs=min(64 if few else 256 // itemsize, _block(out_features)),
        warps=8 if rank_bytes >= (256 if few else 128) else 4,  # what fits the registers of so many threads
        stages=3,
    )


def add_lora_(x: torch.Tensor, y: torch.Tensor, table: LoraTable, tiles: Tiles, blocks: Blocks | None = None) -> None:
    """Adds each adapter's update to its rows of y, in place. Nothing is recorded for gradients.

    Args:
        x: [N, in], rows contiguous.
        y: [N, out] of the same dtype, rows contiguous.
        table: the layer's adapters.
        tiles: the batch's rows.
        blocks: how the work is cut; by default `blocks_for`.
    """
    with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton launches on the current device; -1 leaves it alone
        for part in tiles.lists:
            _launch(x, y, table, part, blocks or blocks_for(part.block, table))


def _launch(x: torch.Tensor, y: torch.Tensor, table: LoraTable, part: TileList, cut: Blocks) -> None:
    count, launch = part.tiles.shape[0], table.launch
    # Whole sums are rounded at once, as the next product wants them; parts stay in float32 until they are added.
    dtype = x.dtype if cut.split == 1 else torch.float32
    low = torch.empty(cut.split, count, part.block, table.width, dtype=dtype, device=x.device)
    common = {
        "width": table.width,
        "fields": FIELDS,
        "rows_block": part.block,
        "rank_block": launch.rank_block,
        "split": cut.split,
        "aligned": launch.aligned,
        # The interpreter multiplies the bits of bfloat16 as if they were integers; their float32 are the same numbers.
        "widened": x.dtype == torch.bfloat16 and isinstance(shrink, InterpretedFunction),
        "num_warps": cut.warps,
    }
    shrink[(count, cut.split)](
        x,
        low,
        table.entries,
        part.tiles,
        table.in_features,
        x.stride(0),
        inputs_block=cut.inputs,
        inputs_even=table.in_features % cut.inputs == 0,
        num_stages=cut.stages,
        **common,
    )
    expand[(count, triton.cdiv(table.out_features, cut.outputs))](
        low,
        y,
        table.entries,
        part.tiles,
        table.out_features,
        y.stride(0),
        outputs_block=cut.outputs,
        outputs_even=table.out_features % cut.outputs == 0,
        rank_multiple=launch.rank_multiple,
        num_stages=1,  # most ranks take one turn of the loop: nothing to overlap, and all parts would be held at once
        **common,
    )


@triton.jit  # type: ignore[untyped-decorator]
def shrink(
    x: tl.tensor,  # [N, in]
    low: tl.tensor,  # [split, T, rows_block, width], float32 if there are parts
    entries: tl.tensor,  # [adapters, fields] int64
    tiles: tl.tensor,  # [T, 3] int32
    in_features: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    fields: tl.constexpr,
    rows_block: tl.constexpr,
    rank_block: tl.constexpr,
    inputs_block: tl.constexpr,
    inputs_even: tl.constexpr,
    split: tl.constexpr,
    aligned: tl.constexpr,
    widened: tl.constexpr,
) -> None:
    """low[part, tile] = x[rows of the tile] · Aᵀ over every `split`-th block of inputs, beginning with the part's."""
    tile, part = tl.program_id(0), tl.program_id(1)
    adapter, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rank = tl.load(entries + adapter * fields + 2).to(tl.int32)
    if (rank == 0) | (stop <= start):
        return
    a = tl.load(entries + adapter * fields).to(tl.pointer_type(x.dtype.element_ty))
    if aligned:
        a = tl.multiple_of(a, 16)
    m, i = tl.arange(0, rows_block), tl.arange(0, inputs_block)
    own = (start + m < stop)[:, None]
    x_rows = x + (start + m).to(tl.int64)[:, None] * x_stride
    at = low + (part * tl.num_programs(0) + tile).to(tl.int64) * rows_block * width + m[:, None] * width
    for first in range(0, rank, rank_block):
        r = first + tl.arange(0, rank_block)
        ranked = (r < rank)[:, None]
        a_rows = a + r[:, None] * in_features
        total = tl.zeros((rows_block, rank_block), dtype=tl.float32)
        for begin in range(part * inputs_block, in_features, split * inputs_block):
            k = (begin + i)[None, :]
            if inputs_even:
                xs = tl.load(x_rows + k, mask=own, other=0.0)
                ws = tl.load(a_rows + k, mask=ranked, other=0.0)
            else:
                xs = tl.load(x_rows + k, mask=own & (k < in_features), other=0.0)
                ws = tl.load(a_rows + k, mask=ranked & (k < in_features), other=0.0)
            if widened:
                xs, ws = xs.to(tl.float32), ws.to(tl.float32)
            total = tl.dot(xs, tl.trans(ws), total, input_precision="ieee")
        tl.store(at + r[None, :], total.to(low.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def expand(
    low: tl.tensor,  # [split, T, rows_block, width], float32 if there are parts
    y: tl.tensor,  # [N, out]
    entries: tl.tensor,  # [adapters, fields] int64
    tiles: tl.tensor,  # [T, 3] int32
    out_features: tl.tensor,
    y_stride: tl.tensor,
    width: tl.tensor,
    fields: tl.constexpr,
    rows_block: tl.constexpr,
    rank_block: tl.constexpr,
    rank_multiple: tl.constexpr,
    outputs_block: tl.constexpr,
    outputs_even: tl.constexpr,
    split: tl.constexpr,
    aligned: tl.constexpr,
    widened: tl.constexpr,
) -> None:
    """y[rows of the tile, a block of outputs] += scaling · (sum of the parts of low) · Bᵀ, added in float32."""
    tile = tl.program_id(0)
    adapter, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rank = tl.load(entries + adapter * fields + 2).to(tl.int32)
    if (rank == 0) | (stop <= start):
        return
    b = tl.load(entries + adapter * fields + 1).to(tl.pointer_type(y.dtype.element_ty))
    scaling = tl.load(entries + adapter * fields + 3).to(tl.int32).to(tl.float32, bitcast=True)
    rank = tl.multiple_of(rank, rank_multiple)
    if aligned:
        b = tl.multiple_of(b, 16)
    m = tl.arange(0, rows_block)
    n = tl.program_id(1) * outputs_block + tl.arange(0, outputs_block)
    there = (start + m < stop)[:, None]
    known = (n < out_features)[:, None]
    if not outputs_even:
        there = there & (n < out_features)[None, :]
    places = y + (start + m).to(tl.int64)[:, None] * y_stride + n[None, :]
    old = tl.load(places, mask=there, other=0.0)
    count = tl.num_programs(0)
    total = tl.zeros((rows_block, outputs_block), dtype=tl.float32)
    for first in range(0, rank, rank_block):
        r = (first + tl.arange(0, rank_block))[None, :]
        ws = tl.load(b + n[:, None] * rank + r, mask=known & (r < rank), other=0.0)
        lows = tl.load(low + tile.to(tl.int64) * rows_block * width + m[:, None] * width + r)
        for part in tl.static_range(1, split):
            lows += tl.load(low + (part * count + tile).to(tl.int64) * rows_block * width + m[:, None] * width + r)
        lows = lows.to(ws.dtype)
        if widened:
            lows, ws = lows.to(tl.float32), ws.to(tl.float32)
        total = tl.dot(lows, tl.trans(ws), total, input_precision="ieee")
    tl.store(places, (old.to(tl.float32) + scaling * total).to(old.dtype), mask=there)


def _block(size: int) -> int:
    """The least power of two that covers a size and that a tensor core multiplies."""
    return max(16, int(triton.next_power_of_2(size)))


def _power_below(number: int, most: int) -> int:
    """The largest power of two up to a number, between 1 and `most`."""
    return min(most, 1 << (max(1, number).bit_length() - 1))
