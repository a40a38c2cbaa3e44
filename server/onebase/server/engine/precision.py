"""Products of a base in half precision, in float32: on CPUs that have no others, and where numbers shall be exact.

Without AVX-512 or its like, a CPU multiplies bfloat16 matrices ten times slower than float32 ones. With it, torch takes
another way for small products than for large ones, and they round differently: a row's numbers depend on its batch. So
weights stay as they are, half the bytes; a block of a weight at a time is widened to float32 just before its product,
and the sum is rounded once, after the adapters' part was added. The backward pass widens again, so training keeps no
copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BLOCK = 2**20
"""Most numbers of a weight that are widened at once: they are still in a CPU's cache when the product reads them."""

HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Half precisions, and what tells whether this CPU multiplies them."""


def widens(dtype: torch.dtype, device: torch.device, *, exact: bool) -> bool:
    """Whether products of this dtype are made in float32 on this device, where numbers shall be exact or need not."""
    if device.type != "cpu" or dtype not in HALF:
        return False
    if exact:
        return True
    supported = getattr(torch.ops.mkldnn, HALF[dtype], None)
    return supported is None or not supported()


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · Wᵀ in float32: x [..., in] of any dtype, W [out, in] frozen and in half precision."""
    product: torch.Tensor = _Product.apply(x.float(), weight)  # type: ignore[no-untyped-call]
    return product


class _Product(torch.autograd.Function):
    """A product that keeps nothing for its backward pass but the narrow weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return _joined([nn.functional.linear(x, part.float()) for part in _blocks(weight, 0)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _joined([torch.matmul(gradient, part.float()) for part in _blocks(ctx.weight, 1)]), None


def _blocks(weight: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Blocks of rows (dim 0) or columns (dim 1), so that every product sums whole rows."""
    return torch.split(weight, max(128, BLOCK // weight.shape[1 - dim] // 128 * 128), dim)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
