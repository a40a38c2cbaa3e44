"""The mixed-adapter linear layer: one product with the base, then each adapter's own low-rank product on its slice.

    y = base(x);   y[a:b] += scaling · (x[a:b] · Aᵀ) · Bᵀ      for each segment [a, b) of the batch

No adapter is ever "set": a layer reads the batch's segments from the Route it holds. Parameters are the adapter's
own tensors of its own rank, so an adapter costs its own bytes and none of another's gradients can reach it.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1; scaling as in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from onebase.server.engine.batch import MIN_ROWS, Route, Segment


@dataclass(frozen=True)
class LoraPair:
    """One layer's update, scaling · B · A."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float


class MultiLoraLinear(nn.Module):
    """A linear layer of the base (plain, Conv1D or quantized) that serves any number of adapters at once.

    Args:
        base: the layer; called as it is, never changed.
        name: its path in the model, under which adapters keep their pair for it.
        route: where it finds the current batch.
    """

    def __init__(self, base: nn.Module, name: str, route: Route) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.route = route
        self.in_features, self.out_features = linear_shape(base)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for models that look at its dtype or device."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        bias: torch.Tensor | None = getattr(self.base, "bias", None)
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, N, in) to (1, N, out)."""
        y: torch.Tensor = self.base(x)
        pairs = [(segment, segment.weights.lora.get(self.name)) for segment in self.route.segments]
        work = [(segment, pair) for segment, pair in pairs if pair is not None]
        if not work:
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        if torch.is_grad_enabled():
            return _add_for_training(flat_x, flat_y, work).view(y.shape)
        for segment, pair in work:
            _add_in_place(flat_x, flat_y, segment, pair)
        return y


def _add_in_place(x: torch.Tensor, y: torch.Tensor, segment: Segment, pair: LoraPair) -> None:
    """Adds one adapter's update to its slice of y, never with fewer than MIN_ROWS rows in a product."""
    start, stop = segment.start, segment.stop
    if stop - start < MIN_ROWS:  # borrow neighbours and throw their results away
        first = min(start, x.shape[0] - MIN_ROWS)
        window = y[first : first + MIN_ROWS].clone()
        _product(x[first : first + MIN_ROWS], window, pair)
        y[start:stop] = window[start - first : stop - first]
    else:
        _product(x[start:stop], y[start:stop], pair)


def _product(x: torch.Tensor, y: torch.Tensor, pair: LoraPair) -> None:
    low = torch.mm(x.to(pair.a.dtype), pair.a.t())
    if y.dtype == pair.b.dtype:
        y.addmm_(low, pair.b.t(), alpha=pair.scaling)
    else:  # a base of lower precision: the update is made in the adapter's and rounded once
        y.copy_(torch.addmm(y.to(pair.b.dtype), low, pair.b.t(), alpha=pair.scaling))


def _add_for_training(x: torch.Tensor, y: torch.Tensor, work: list[tuple[Segment, LoraPair]]) -> torch.Tensor:
    """The same sum, out of place, so that autograd reaches each adapter's own parameters."""
    pieces: list[torch.Tensor] = []
    end = 0
    for segment, pair in work:
        if segment.start > end:
            pieces.append(y[end : segment.start])
        low = torch.mm(x[segment.start : segment.stop].to(pair.a.dtype), pair.a.t())
        part = torch.addmm(y[segment.start : segment.stop].to(pair.b.dtype), low, pair.b.t(), alpha=pair.scaling)
        pieces.append(part.to(y.dtype))
        end = segment.stop
    if end < y.shape[0]:
        pieces.append(y[end:])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, also of transformers' Conv1D."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt this layer: nn.Linear and its quantized kin, and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def install(model: nn.Module, layers: nn.Module, route: Route) -> dict[str, MultiLoraLinear]:
    """Puts a MultiLoraLinear around every linear layer below `layers` (not the output embedding).

    Args:
        model: the causal LM; names are paths from here, as PEFT counts them.
        layers: the part of it that holds the transformer's blocks.
        route: shared by all of them.

    Returns:
        The wrapped layers by path.
    """
    inside = {id(module) for module in layers.modules()}
    found = [(name, module) for name, module in model.named_modules() if id(module) in inside and is_linear(module)]
    wrapped: dict[str, MultiLoraLinear] = {}
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        wrapped[name] = MultiLoraLinear(module, name, route)
        setattr(model.get_submodule(parent), leaf, wrapped[name])
    return wrapped
