"""Random layers with several adapters, laid out so that a kernel that reads or writes a number too far is found out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onebase.server.engine.kernels import AdapterEntries, LoraTable, LoraTables, Tiles, add_lora
from onebase.server.engine.lora import LoraPair

GUARD = 64
CANARY = 12345.0
CPU = torch.device("cpu")


@dataclass
class Layer:
    """x and y of a batch, and each adapter's pair."""

    x: torch.Tensor  # [N, in]; NaN where a row has no adapter
    y: torch.Tensor  # [N, out], a view into `around`; -0.0 where a row has no adapter
    around: torch.Tensor  # y's memory, with canaries before, between and after its rows
    pairs: list[LoraPair | None]
    bounds: list[tuple[int, int]]

    def table(self, *, kernel: bool | None = None, capacity: int | None = None) -> LoraTable:
        shapes = {"layer": (self.x.shape[1], self.y.shape[1])}
        adapters = [AdapterEntries({} if pair is None else {"layer": pair}, shapes, CPU) for pair in self.pairs]
        table = LoraTables(adapters, kernel=kernel, capacity=capacity).layer("layer")
        if table is None:
            raise ValueError("no adapter has a pair")
        return table

    def tiles(self, *, exact: bool = False, capacity: int | None = None) -> Tiles:
        return Tiles.of(self.bounds, CPU, exact=exact, capacity=capacity)

    def expected(self) -> torch.Tensor:
        """The updated y in float64, from the numbers that the products use."""
        y = self.y.detach().double()
        for pair, (start, stop) in zip(self.pairs, self.bounds, strict=True):
            if pair is not None:
                low = self.x[start:stop].detach().double() @ pair.compute_a.double().t()
                y[start:stop] += pair.scaling * low @ pair.compute_b.double().t()
        return y

    def error(self, y: torch.Tensor) -> float:
        """The largest relative error of a row, by its Euclidean norm."""
        expected = self.expected()
        errors = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
        return max(errors[~self.untouched()].tolist(), default=0.0)

    def untouched(self) -> torch.Tensor:
        """[N], whether a row is to stay as it is."""
        outside = torch.ones(self.x.shape[0], dtype=torch.bool)
        for pair, (start, stop) in zip(self.pairs, self.bounds, strict=True):
            if pair is not None:
                outside[start:stop] = False
        return outside

    def rest_holds(self) -> bool:
        """Whether rows without an adapter and y's memory around are unchanged; adding 0.0 would make -0.0 into 0.0."""
        rows, width = self.y.shape
        beside = (self.around[0], self.around[-1], self.around[1 : rows + 1, width:])
        rest = self.y[self.untouched()]
        return bool((rest.signbit() & (rest == 0)).all()) and all(bool((memory == CANARY).all()) for memory in beside)

    def gradients(self, *, kernel: bool | None = None) -> list[torch.Tensor | None]:
        """Of the sum of the updated y times fixed numbers: by x, y and every A and B."""
        x, y = self.x.clone().requires_grad_(), self.y.clone().requires_grad_()
        parameters = [tensor for pair in self.pairs if pair is not None for tensor in (pair.a, pair.b)]
        after = add_lora(x, y, self.table(kernel=kernel), self.tiles())
        return list(torch.autograd.grad(after, [x, y, *parameters], self.weights(), allow_unused=True))

    def expected_gradients(self) -> list[torch.Tensor]:
        """The same in float64 by torch's own autograd."""
        x, y = (tensor.double().requires_grad_() for tensor in (self.x, self.y))
        parameters, pieces, end = [], [], 0
        for pair, (start, stop) in zip(self.pairs, self.bounds, strict=True):
            if pair is not None:
                a, b = (tensor.detach().double().requires_grad_() for tensor in (pair.compute_a, pair.compute_b))
                parameters += [a, b]
                pieces += [y[end:start], y[start:stop] + pair.scaling * (x[start:stop] @ a.t()) @ b.t()]
                end = stop
        after = torch.cat([*pieces, y[end:]])
        return list(torch.autograd.grad(after, [x, y, *parameters], self.weights().double()))

    def weights(self) -> torch.Tensor:
        """[N, out], what the updated y is multiplied by."""
        return torch.randn(self.y.shape, generator=torch.Generator().manual_seed(7)).to(self.y.dtype)


def relative_errors(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor]) -> list[float]:
    """By the Euclidean norm; None stands for zeros."""
    return [
        float(one.norm() if it is None else (it.double() - one).norm() / one.norm().clamp(min=1e-9))
        for it, one in zip(found, expected, strict=True)
    ]


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with NaN before and after them in memory."""
    memory = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype)
    inside = memory[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def make_layer(
    counts: Sequence[int],
    ranks: Sequence[int | None],
    *,
    in_features: int = 48,
    out_features: int = 40,
    dtype: torch.dtype = torch.float32,
    gaps: int = 1,
    seed: int = 0,
) -> Layer:
    """Segments of `counts` rows, one adapter of each of `ranks`, and `gaps` rows without an adapter around each."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * scale

    bounds, end = [], 0
    for count in counts:
        bounds.append((end + gaps, end + gaps + count))
        end += gaps + count
    pairs: list[LoraPair | None] = []
    for place, rank in enumerate(ranks):
        if rank is None:
            pairs.append(None)
            continue
        a = guarded(normal(rank, in_features, scale=in_features**-0.5).to(dtype))
        b = guarded(normal(out_features, rank, scale=rank**-0.5).to(dtype))
        scaling = (-1.0) ** place * (0.5 + place)
        pairs.append(LoraPair(a.detach().float().requires_grad_(), b.detach().float().requires_grad_(), scaling, a, b))
    rows = end + gaps
    x, y = normal(rows, in_features).to(dtype), normal(rows, out_features).to(dtype)
    around = torch.full((rows + 2, out_features + GUARD), CANARY, dtype=dtype)
    inside = around[1 : rows + 1, :out_features].copy_(y)
    layer = Layer(guarded(x), inside, around, pairs, bounds)
    layer.x[layer.untouched()] = torch.nan
    layer.y[layer.untouched()] = -0.0
    return layer
