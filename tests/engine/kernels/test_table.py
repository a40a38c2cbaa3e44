from __future__ import annotations

import pytest
import torch
from engine.kernels.layers import CPU, make_layer

from onebase.server.engine.kernels import AdapterEntries, LoraTables, Tiles
from onebase.server.engine.kernels.table import FIELDS, LARGE_TILE, SMALL_TILE
from onebase.server.engine.lora import LoraPair

SHAPES = {"down": (8, 8), "gate": (8, 8), "layer": (8, 8), "up": (8, 8)}
TRANSPOSED = torch.ones(8, 2)


def pair(rank: int, in_features: int = 8, out_features: int = 8, dtype: torch.dtype = torch.float32) -> LoraPair:
    return LoraPair.of(torch.ones(rank, in_features), torch.ones(out_features, rank), 2.0, dtype)


def entries(pairs: dict[str, LoraPair], shapes: dict[str, tuple[int, int]] = SHAPES) -> AdapterEntries:
    return AdapterEntries(pairs, shapes, CPU)


def covered(tiles: Tiles) -> list[tuple[int, int]]:
    """(adapter, row) of every row of every tile."""
    rows = [tuple(row) for part in tiles.lists for row in part.tiles.tolist()]
    return sorted((adapter, place) for adapter, start, stop in rows for place in range(start, stop))


@pytest.mark.parametrize("exact", [False, True])
def test_tiles_cover_every_row_once_and_none_is_empty(exact: bool) -> None:
    bounds = [(2, 3), (3, 3), (5, 5 + SMALL_TILE), (40, 41 + SMALL_TILE), (60, 60 + 2 * LARGE_TILE), (300, 411)]
    tiles = Tiles.of(bounds, CPU, exact=exact)
    assert covered(tiles) == [(a, row) for a, (start, stop) in enumerate(bounds) for row in range(start, stop)]
    for part in tiles.lists:
        lengths = part.tiles[:, 2] - part.tiles[:, 1]
        assert lengths.min() > 0
        assert lengths.max() <= part.block
    assert [part.block for part in tiles.lists] == [SMALL_TILE] + [LARGE_TILE] * (not exact)


def test_the_size_of_a_tile_depends_on_its_own_segment() -> None:
    alone = Tiles.of([(0, SMALL_TILE)], CPU)
    beside = Tiles.of([(0, SMALL_TILE), (SMALL_TILE, 500)], CPU)
    assert [part.block for part in alone.lists] == [SMALL_TILE]
    assert beside.lists[0].tiles.equal(alone.lists[0].tiles)


def test_nothing_to_do_is_no_tile() -> None:
    assert Tiles.of([], CPU).lists == ()
    assert Tiles.of([(3, 3)], CPU).lists == ()


@pytest.mark.parametrize("bounds", [[(0, 4), (3, 5)], [(4, 3)], [(-1, 2)]])
def test_bounds_that_overlap_or_descend_are_refused(bounds: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="segment"):
        Tiles.of(bounds, CPU)


def test_capacity_pads_and_limits() -> None:
    tiles = Tiles.of([(0, 40)], CPU, capacity=5)
    (part,) = tiles.lists
    assert part.tiles.tolist() == [[0, 0, 16], [0, 16, 32], [0, 32, 40], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="capacity of 2"):
        Tiles.of([(0, 40)], CPU, capacity=2)
    with pytest.raises(ValueError, match="capacity of 1"):
        LoraTables([entries({"layer": pair(2)}), entries({"layer": pair(2)})], capacity=1)


def test_a_table_holds_addresses_and_copies_nothing() -> None:
    adapters = [{"up": pair(2), "down": pair(3)}, {"up": pair(5)}]
    tables = LoraTables([entries(pairs) for pairs in adapters], capacity=3)
    down = tables.layer("down")
    assert down is not None
    assert down.pairs == (adapters[0]["down"], None)
    assert down.entries[1:].eq(0).all()
    assert down.entries[0, :3].tolist() == [down.pairs[0].compute_a.data_ptr(), down.pairs[0].compute_b.data_ptr(), 3]
    assert down.entries[0, 3].int().view(torch.float32).item() == 2.0
    assert tables.entries.shape == (len(SHAPES), 3, FIELDS)
    assert tables.layer("gate") is None
    assert tables.layer("down") is down


def test_adapters_without_any_pair_make_no_table() -> None:
    tables = LoraTables([entries({}), entries({})])
    assert tables.layer("layer") is None
    assert tables.launch is None


@pytest.mark.parametrize(
    ("dtype", "ranks", "rank_block", "width", "multiple"),
    [
        (torch.bfloat16, [8, 16], 16, 16, 8),
        (torch.bfloat16, [1], 16, 16, 1),
        (torch.bfloat16, [4, 72], 128, 128, 4),
        (torch.bfloat16, [256], 128, 256, 8),
        (torch.float32, [8, 16], 16, 16, 4),
        (torch.float32, [130], 64, 192, 2),
    ],
)
def test_launch(dtype: torch.dtype, ranks: list[int], rank_block: int, width: int, multiple: int) -> None:
    tables = LoraTables([entries({"layer": pair(rank, dtype=dtype)}) for rank in ranks])
    assert tables.launch is not None
    assert (tables.launch.rank_block, tables.width, tables.launch.rank_multiple) == (rank_block, width, multiple)
    assert tables.launch.dtype == dtype


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (pair(2, in_features=9), r"'layer'.*\(2, 9\)"),
        (pair(2, out_features=9), r"'layer'.*\(9, 2\)"),
        (LoraPair(torch.ones(2, 8), torch.ones(8, 2), 1.0, torch.ones(2, 8), torch.ones(8, 2).half()), "float16"),
        (LoraPair(TRANSPOSED.t(), TRANSPOSED, 1.0, TRANSPOSED.t(), TRANSPOSED), "contiguous"),
    ],
    ids=["in", "out", "dtype", "layout"],
)
def test_pairs_that_do_not_fit_are_refused_by_layer(other: LoraPair, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        entries({"up": pair(2), "layer": other})


def test_a_pair_for_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="'head' is none of the base's"):
        entries({"head": pair(2)})


def test_adapters_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16, .*float32"):
        LoraTables([entries({"layer": pair(2)}), entries({"layer": pair(2, dtype=torch.bfloat16)})])
    with pytest.raises(ValueError, match="several bases"):
        LoraTables([entries({}), entries({}, dict(SHAPES))])


def test_a_table_keeps_its_tensors_alive() -> None:
    layer = make_layer([2], [3])
    table = layer.table()
    assert table.pairs[0] is layer.pairs[0]
