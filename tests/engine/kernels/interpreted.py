"""The Triton kernels under Triton's interpreter. Run by test_segmented_lora in a process of its own.

The interpreter cuts numbers off where it makes bfloat16 of them, instead of rounding; hence the width of its bound.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.kernels.layers import CPU, Layer, make_layer, relative_errors
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.server.engine.kernels import Tiles, add_lora, available, segmented_lora

BOUNDS = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Largest relative error of a row: some roundings of each dtype."""

MIXED = {"counts": [1, 0, 17, 5, 70, 16, 3], "ranks": [4, 8, 33, None, 16, 64, 1]}
"""Empty, short and long segments, some in several tiles, and an adapter that leaves the layer alone."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has written yet is not a number."""

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(torch, "empty", empty)


def updated(layer: Layer, *, exact: bool = False) -> torch.Tensor:
    """y after the kernel, which is checked to have been the kernel and to have kept to its rows."""
    table = layer.table()
    assert table.kernel
    before = layer.y.clone()
    with torch.no_grad():
        assert add_lora(layer.x, layer.y, table, layer.tiles(exact=exact)) is layer.y
    assert layer.rest_holds()
    after = layer.y.clone()
    layer.y.copy_(before)
    return after


def test_the_interpreter_is_there() -> None:
    assert available(CPU)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_mixed_segments(dtype: torch.dtype, exact: bool) -> None:
    layer = make_layer(**MIXED, in_features=72, out_features=88, dtype=dtype)
    assert layer.error(updated(layer, exact=exact)) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(1, 1), (16, 130), (513, 64), (1100, 72), (2100, 8)],
    ids=["one", "outputs over several blocks", "a rest of one input", "split inputs", "inputs split for long segments"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    layer = make_layer([2, 65], [8, 5], in_features=in_features, out_features=out_features, dtype=dtype)
    assert layer.error(updated(layer)) < BOUNDS[dtype] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_beyond_one_block(dtype: torch.dtype) -> None:
    layer = make_layer([3, 20, 1], [130, 24, 256], in_features=300, dtype=dtype)
    assert layer.error(updated(layer)) < BOUNDS[dtype] * 2


def test_tensors_that_are_not_aligned() -> None:
    layer = make_layer([3, 2], [8, 8])
    for pair in layer.pairs:
        memory = torch.empty(pair.compute_a.numel() + 1)
        object.__setattr__(pair, "compute_a", memory[1:].view(pair.compute_a.shape).copy_(pair.compute_a))
    assert not layer.table().launch.aligned
    assert layer.error(updated(layer)) < BOUNDS[torch.float32]


def test_the_same_bits_twice() -> None:
    layer = make_layer(**MIXED, in_features=1100)
    assert updated(layer).equal(updated(layer))


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    layer = make_layer([3, 40], [8, 16])
    whole = updated(layer)
    layer.x[2] = torch.nan
    broken = updated(layer)
    assert broken[2].isnan().all()
    others = torch.arange(len(whole)) != 2
    assert broken[others].equal(whole[others])


def test_numbers_that_change_in_place_are_seen() -> None:
    layer = make_layer([3], [8])
    table, tiles = layer.table(), layer.tiles()
    layer.pairs[0].compute_b.mul_(2)
    with torch.no_grad():
        after = add_lora(layer.x, layer.y.clone(), table, tiles)
    assert layer.error(after) < BOUNDS[torch.float32]


def test_a_captured_launch_serves_other_adapters_and_rows() -> None:
    """What a CUDA graph does: the same tensors, refilled."""
    first = make_layer([1, 1, 1], [8, 4, 16], gaps=0)
    table, tiles = first.table(capacity=4), first.tiles(capacity=5)
    other = make_layer([1, 2], [12, 16], gaps=0, seed=1)
    refill = other.table(capacity=4)
    assert (refill.launch.rank_block, refill.width) == (table.launch.rank_block, table.width)
    table.entries.copy_(refill.entries)
    tiles.lists[0].tiles.copy_(other.tiles(capacity=5).lists[0].tiles)
    with torch.no_grad():
        after = add_lora(other.x, other.y.clone(), table, tiles)
    assert other.error(after) < BOUNDS[torch.float32]


def test_every_cut_of_the_work_gives_the_same_sum() -> None:
    layer = make_layer([2, 30], [8, 40], in_features=200, out_features=100)
    table, tiles = layer.table(), Tiles.of(layer.bounds, CPU)
    for inputs, split, outputs in [(16, 1, 16), (16, 16, 128), (64, 2, 32), (256, 4, 64)]:
        cut = segmented_lora.Blocks(inputs, split, outputs, warps=4, stages=1)
        after = layer.y.clone()
        segmented_lora.add_lora_(layer.x, after, table, tiles, cut)
        assert layer.error(after) < BOUNDS[torch.float32], cut


def test_gradients_of_a_recorded_update() -> None:
    layer = make_layer(**MIXED, in_features=24)
    layer.x[layer.untouched()] = 0.0
    assert max(relative_errors(layer.gradients(), layer.expected_gradients())) < 1e-6


SIZES = st.integers(1, 70)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    segments=st.lists(st.tuples(st.integers(0, 20), st.none() | st.integers(1, 20)), min_size=1, max_size=4),
    in_features=SIZES,
    out_features=SIZES,
    gaps=st.integers(0, 2),
    exact=st.booleans(),
)
def test_any_shapes(
    segments: list[tuple[int, int | None]], in_features: int, out_features: int, gaps: int, exact: bool
) -> None:
    counts, ranks = [count for count, _ in segments], [rank for _, rank in segments]
    if sum(counts) + gaps == 0 or all(rank is None for rank in ranks):
        return
    layer = make_layer(counts, ranks, in_features=in_features, out_features=out_features, gaps=gaps)
    assert layer.error(updated(layer, exact=exact)) < 4e-6
