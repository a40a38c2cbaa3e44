"""The one call for a layer, on the torch path."""

from __future__ import annotations

import pytest
import torch
from engine.kernels.layers import CPU, make_layer, relative_errors

from onebase.server.engine.kernels import Tiles, add_lora

MIXED = {"counts": [1, 0, 17, 5, 70, 3], "ranks": [4, 8, 33, None, 16, 1]}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_torch_makes_the_same_update_in_place(dtype: torch.dtype, bound: float) -> None:
    layer = make_layer(**MIXED, dtype=dtype)
    before = layer.y.clone()
    with torch.no_grad():
        assert add_lora(layer.x, layer.y, layer.table(kernel=False), layer.tiles()) is layer.y
    assert layer.rest_holds()
    after = layer.y.clone()
    layer.y.copy_(before)
    assert layer.error(after) < bound


def test_gradients_reach_x_y_and_every_adapter() -> None:
    layer = make_layer(**MIXED)
    layer.x[layer.untouched()] = 0.0
    assert max(relative_errors(layer.gradients(kernel=False), layer.expected_gradients())) < 1e-6


def test_recording_leaves_y_alone() -> None:
    layer = make_layer([3], [4])
    before = layer.y.clone()
    after = add_lora(layer.x, layer.y, layer.table(kernel=False), layer.tiles())
    assert after.requires_grad
    assert layer.y.equal(before)
    assert layer.error(after.detach()) < 1e-6


def test_an_adapter_without_rows_gets_no_gradient() -> None:
    layer = make_layer([3, 0], [4, 4])
    layer.x[layer.untouched()] = 0.0
    gradients = layer.gradients(kernel=False)
    assert [gradient is None for gradient in gradients] == [False, False, False, False, True, True]


def test_gradients_of_an_adapter_are_the_bits_it_gets_alone() -> None:
    both, alone = make_layer([6, 9], [4, 8]), make_layer([6, 9], [4, 8])
    for layer in (both, alone):
        layer.x[layer.untouched()] = 0.0
    alone.pairs[1] = None
    mixed, solo = both.gradients(kernel=False), alone.gradients(kernel=False)
    assert mixed[2].equal(solo[2])
    assert mixed[3].equal(solo[3])


def test_a_parameter_changed_before_backward_is_noticed() -> None:
    layer = make_layer([3], [4])
    after = add_lora(layer.x, layer.y, layer.table(kernel=False), layer.tiles())
    with torch.no_grad():
        layer.pairs[0].a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        after.sum().backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:, 1:], y), r"not \(N, 48\)"),
        (lambda x, y: (x, y[:, 1:]), r"not .* \(N, 40\)"),
        (lambda x, y: (x[1:], y), "rows"),
        (lambda x, y: (x[:-2], y[:-2]), "segments end at 4"),
        (lambda x, y: (x.bfloat16(), y), "bfloat16"),
        (lambda x, y: (x.t().contiguous().t(), y), "contiguous"),
    ],
    ids=["in", "out", "rows", "segments", "dtype", "layout"],
)
def test_what_does_not_fit_is_refused(change: object, words: str) -> None:
    layer = make_layer([3], [4])
    x, y = change(layer.x, layer.y)  # type: ignore[operator]
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        add_lora(x, y, layer.table(kernel=False), layer.tiles())


def test_more_segments_than_adapters_are_refused() -> None:
    layer = make_layer([3, 3], [4, 4])
    fewer = make_layer([3], [4])
    with torch.no_grad(), pytest.raises(ValueError, match="2 segments for 1 adapters"):
        add_lora(layer.x, layer.y, fewer.table(kernel=False), Tiles.of(layer.bounds, CPU))
