"""Linear layers whose weights bitsandbytes has quantized to int8 or nf4, and products that depend on their rows alone.

bitsandbytes stores the weights; the products are ours. Its own depend on the batch and on the mode: int8 takes a column
with an outlier in any row out of every row's product, and nf4 is packed anew on some CPUs when a layer first runs
without gradients, rounds to bfloat16 from then on, and has no backward any more. Here a weight is widened to the
activations' dtype, a block of rows at a time, and nothing else changes: prefill, decoding, scoring and training compute
the same numbers, row by row as exactly as on a plain base. The backward pass widens the weight again, so training keeps
no copy of it.

bitsandbytes is imported only where a base is quantized: it is not made for every machine.

Sources: LLM.int8(), Dettmers et al. 2022 (arXiv:2208.07339), section 2 (absmax by rows); QLoRA, Dettmers et al. 2023
(arXiv:2305.14314), section 3 (NF4 by blocks). Unlike them, activations are never rounded to int8, and the scales of
blocks are not quantized in their turn.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from onebase.server.errors import FailedPrecondition

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

BLOCK = 2**20
"""Most numbers of a weight that are widened at once: they are still in a CPU's cache when the product reads them."""

ROW_STEP = 128
"""Rows of a block are a multiple of this, so that it begins with a scale of its own: nf4 has one for 64 numbers."""

SMALLER = 2.0**-7
"""int8 codes reach 127: activations are made this much smaller before, so that products fit into float16."""


def loading_config(quantization: str) -> BitsAndBytesConfig | None:
    """What transformers needs to quantize the linear layers of the blocks while it loads; None for "none".

    Raises:
        FailedPrecondition: bitsandbytes is not installed.
    """
    if quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FailedPrecondition(
            "NO_BITSANDBYTES",
            f"quantization is {quantization!r}, and bitsandbytes is not installed: pip install bitsandbytes",
            field="quantization",
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer with a quantized weight.

    It has no `weight`: a model that looks at one gets an error, and is refused, instead of codes.

    Args:
        codes: the weight as it is stored.
        scales: float32, what its numbers are multiplied by.
        bias: [out] in the model's dtype, or None.
        shape: (out, in) of the weight.
    """

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in x's dtype."""
        y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ: [..., in] to [..., out]."""

    @abstractmethod
    def product_back(self, y: torch.Tensor) -> torch.Tensor:
        """y · W: [..., out] to [..., in]."""

    @abstractmethod
    def _widened(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows [start, stop) of the stored weight in a dtype: [stop - start, in]."""

    def _by_blocks(self, x: torch.Tensor) -> torch.Tensor:
        size, step = self.out_features, max(ROW_STEP, BLOCK // self.in_features // ROW_STEP * ROW_STEP)
        parts = [
            nn.functional.linear(x, self._widened(start, min(start + step, size), x.dtype))
            for start in range(0, size, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _Product(torch.autograd.Function):
    """A product that keeps nothing for its backward pass but the layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer: QuantizedLinear = ctx.layer
        return layer.product_back(gradient), None


class Int8Linear(QuantizedLinear):
    """W[i, j] = scales[i] · codes[i, j] · SMALLER, with codes int8 [out, in]: each is exact in bfloat16 and float16."""

    @classmethod
    def of(cls, layer: Linear8bitLt) -> Int8Linear:
        """Takes over what bitsandbytes stored, where the largest of a row is 127."""
        codes, largest = layer.weight.data, layer.weight.SCB
        return cls(codes, largest.float() / (127 * SMALLER), layer.bias, (codes.shape[0], codes.shape[1]))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ: [..., in] to [..., out]."""
        # In float32: a product of two dtypes is ten times slower on a CPU.
        return self._by_blocks(x * SMALLER).float().mul_(self.scales).to(x.dtype)

    def product_back(self, y: torch.Tensor) -> torch.Tensor:
        """y · W: [..., out] to [..., in]."""
        scaled = (y.float() * self.scales).to(y.dtype)
        return torch.matmul(scaled, self._widened(0, self.out_features, y.dtype)).mul_(SMALLER)

    def _widened(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self.codes[start:stop].to(dtype)


class Nf4Linear(QuantizedLinear):
    """Codes of four bits, two in a byte, row by row; each block of `block` neighbours shares one of the scales.

    bitsandbytes widens them as rows of one block: told the weight's own shape, its CPU kernel (0.50) takes wrong scales
    where a row is no multiple of a block. So the last block is filled up here.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        block: int,
    ) -> None:
        fill = scales.numel() * block // 2 - codes.numel()
        super().__init__(nn.functional.pad(codes, (0, fill)) if fill else codes, scales, bias, shape)
        self._block = block

    @classmethod
    def of(cls, layer: Linear4bit) -> Nf4Linear:
        """Takes over what bitsandbytes stored."""
        state = layer.weight.quant_state
        return cls(layer.weight.data.view(-1), state.absmax, layer.bias, tuple(state.shape), state.blocksize)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ: [..., in] to [..., out]."""
        return self._by_blocks(x)

    def product_back(self, y: torch.Tensor) -> torch.Tensor:
        """y · W: [..., out] to [..., in]."""
        return torch.matmul(y, self._widened(0, self.out_features, y.dtype))

    def _widened(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        block, size = self._block, (stop - start) * self.in_features
        first, last = start * self.in_features // block, -(-stop * self.in_features // block)
        state = QuantState(
            absmax=self.scales[first:last],
            shape=torch.Size((last - first, block)),
            dtype=dtype,
            blocksize=block,
            quant_type="nf4",
        )
        numbers: torch.Tensor = dequantize_4bit(self.codes[first * block // 2 : last * block // 2, None], state)
        return numbers.view(-1)[:size].view(stop - start, self.in_features)


def take_over(model: nn.Module) -> None:
    """Puts our layers in the place of bitsandbytes', over the same storage, and gives back what loading used."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear8bitLt):
            ours: QuantizedLinear = Int8Linear.of(module)
        elif isinstance(module, Linear4bit):
            ours = Nf4Linear.of(module)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ours)
    _let_go(model)


def _let_go(model: nn.Module) -> None:
    """Frees the whole model's worth of memory that loading leaves behind on a CPU.

    What was not quantized may be a view of the mapped file, which keeps all of it resident; and glibc keeps the copies
    that bitsandbytes made and freed.
    """
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none
        if trim is not None:
            trim(0)
