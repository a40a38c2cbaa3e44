"""The mixed-adapter linear layer: one product with the base, then each adapter's own low-rank product on its slice.

    y = base(x);   y[a:b] += scaling · (x[a:b] · Aᵀ) · Bᵀ      for each segment [a, b) of the batch

No adapter is ever "set": a layer reads the batch's segments from the Route it holds. Parameters are the adapter's
own tensors of its own rank, so an adapter costs its own bytes and none of another's gradients can reach it. Where the
Route brings a `SegmentedStep`, the kernels make all adapters' products at once; torch's are what they must equal.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1; scaling as in PEFT.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from onebase.server.engine.batch import MIN_ROWS, Route, Segment
from onebase.server.engine.precision import wide_linear
from onebase.server.engine.quantized import QuantizedLinear
from onebase.server.engine.stacks import SegmentGroup, Stack, padded_rank


@dataclass(frozen=True)
class LoraPair:
    """One layer's update, scaling · B · A: parameters in float32, and the numbers that products use.

    On a float32 base the two are the same tensors; on a base of lower precision the products use a rounded copy.
    """

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float
    compute_a: torch.Tensor  # [r, in] in the base's dtype, without gradients
    compute_b: torch.Tensor  # [out, r]

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> LoraPair:
        """A pair whose products are made in `dtype`."""
        return cls(a, b, scaling, a.detach().to(dtype), b.detach().to(dtype))

    def refresh(self) -> None:
        """Brings the products' numbers up to date after the parameters changed."""
        if self.compute_a.dtype != self.a.dtype:
            self.compute_a.copy_(self.a.detach())
            self.compute_b.copy_(self.b.detach())


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
        dtype = x.dtype
        if self.route.wide:
            x = x.float()
        y = self._base(x)
        groups, segmented = self.route.groups, self.route.segmented
        if groups or segmented is not None:
            flat_x, flat_y = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
            if segmented is not None:
                segmented.add(self.name, flat_x, flat_y)
            elif torch.is_grad_enabled():
                y = self._train(flat_x, flat_y, groups).view(y.shape)
            else:
                self._add_all(flat_x, flat_y, groups)
        return y.to(dtype) if self.route.wide else y

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        """The base's product, in x's dtype."""
        if not self.route.wide or isinstance(self.base, QuantizedLinear):
            y: torch.Tensor = self.base(x)
            return y
        y = wide_linear(x, self.weight if isinstance(self.base, nn.Linear) else self.weight.t())
        return y if self.bias is None else y + self.bias

    def _add_all(self, x: torch.Tensor, y: torch.Tensor, groups: Sequence[SegmentGroup]) -> None:
        for group in groups:
            if group.stack is None:
                self._add(x, y, group.segments[0])
            else:
                self._add_stacked(x, y, group, group.stack)

    def _add(self, x: torch.Tensor, y: torch.Tensor, segment: Segment) -> None:
        """Adds one adapter's update to its slice of y, never with fewer than MIN_ROWS rows in a product."""
        pair = segment.weights.lora.get(self.name)
        if pair is None:
            return
        start, stop = segment.start, segment.stop
        first, last = window(start, stop, x.shape[0])
        a, b = widened(pair.compute_a, pair.compute_b)
        low = torch.mm(x[first:last], a.t()).mul_(pair.scaling)
        if last - first == stop - start:
            y[start:stop].addmm_(low, b.t())
        else:  # neighbours were borrowed; their results are thrown away
            y[start:stop] = torch.addmm(y[first:last], low, b.t())[start - first : stop - first]

    def _add_stacked(self, x: torch.Tensor, y: torch.Tensor, group: SegmentGroup, stack: Stack) -> None:
        """Adds several adapters' updates at once (see `stacks`)."""
        pair = stack.layer(self.name)
        if pair is None:
            return
        start, stop = group.start, group.stop
        first, last = window(start, stop, x.shape[0])
        low = torch.mm(x[first:last], pair.a.t())
        own, foreign = group.own(pair)
        # filled, not only multiplied by 0: another adapter's A may be so large that the product is infinite
        low[start - first : stop - first].mul_(own).masked_fill_(foreign, 0.0)
        if last - first == stop - start:
            y[start:stop].addmm_(low, pair.b.t())
        else:
            y[start:stop] = torch.addmm(y[first:last], low, pair.b.t())[start - first : stop - first]

    def _train(self, x: torch.Tensor, y: torch.Tensor, groups: Sequence[SegmentGroup]) -> torch.Tensor:
        """The same sum, out of place, so that autograd reaches each adapter's own parameters."""
        pairs = [
            (segment, pair)
            for group in groups
            for segment in group.segments
            if (pair := segment.weights.lora.get(self.name)) is not None
        ]
        if not pairs:
            return y
        # split, not sliced: the backward pass of a slice fills a whole tensor with zeros, that of a split is one cat
        cuts = [at for segment, _ in pairs for at in (segment.start, segment.stop)]
        sizes = [stop - start for start, stop in itertools.pairwise([0, *cuts, y.shape[0]])]
        kept, inputs = list(torch.split(y, sizes)), torch.split(x, sizes)
        for place, (_, pair) in enumerate(pairs):
            at = 2 * place + 1  # between what is not adapted before it and after it
            a, b = widened(pair.a.to(y.dtype), pair.b.to(y.dtype))
            low = torch.mm(inputs[at], a.t()) * pair.scaling
            kept[at] = torch.addmm(kept[at], low, b.t())
        there = [piece for piece in kept if piece.shape[0]]
        return there[0] if len(there) == 1 else torch.cat(there)


def window(start: int, stop: int, size: int) -> tuple[int, int]:
    """The rows of a product for [start, stop): itself, or with neighbours if it has fewer than MIN_ROWS."""
    if stop - start >= MIN_ROWS:
        return start, stop
    first = min(start, size - MIN_ROWS)
    return first, first + MIN_ROWS


def widened(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with zeros up to a rank whose products round alike, alone and stacked."""
    fill = padded_rank(a.shape[0]) - a.shape[0]
    if not fill:
        return a, b
    return nn.functional.pad(a, (0, 0, 0, fill)), nn.functional.pad(b, (0, fill))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, also of transformers' Conv1D."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can adapt this layer: nn.Linear and its quantized kin, and transformers' Conv1D."""
    return isinstance(module, nn.Linear | QuantizedLinear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


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
