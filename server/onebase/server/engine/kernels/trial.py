"""A trial by running: whether the kernels compile on this machine and give torch's numbers.

Triton compiles when a kernel is first launched, with the machine's own C compiler and driver; a server had better find
out before it serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from onebase.server.engine.kernels.table import LARGE_TILE, AdapterEntries, LoraTables, Tiles
from onebase.server.engine.kernels.update import add_lora

LARGEST_ERROR = {torch.float32: 1e-5, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-5}
"""What the kernels are made for, and the largest relative error of a row that some roundings explain."""

FEATURES, RANKS, BOUNDS = 512, (8, 20), ((1, 4), (4, 5 + LARGE_TILE))
"""Both sizes of tiles, split inputs, and a rank that fills no block."""


class KernelFailure(Exception):
    """The kernels cannot be used here; the message says why."""


@dataclass(frozen=True)
class _Pair:
    compute_a: torch.Tensor
    compute_b: torch.Tensor
    scaling: float = 0.5

    @property
    def a(self) -> torch.Tensor:
        return self.compute_a

    @property
    def b(self) -> torch.Tensor:
        return self.compute_b


@torch.no_grad()
def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Makes one small update by the kernels and by torch.

    Raises:
        KernelFailure: the kernels are not made for this dtype, do not compile or run, or give other numbers.
    """
    if dtype not in LARGEST_ERROR:
        raise KernelFailure(f"there are no kernels for {dtype}")
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        numbers = torch.randn(rows, columns, generator=random) / math.sqrt(columns)
        return numbers.to(device, dtype)

    shapes = {"layer": (FEATURES, FEATURES)}
    pairs = [_Pair(normal(rank, FEATURES), normal(FEATURES, rank)) for rank in RANKS]
    adapters = [AdapterEntries({"layer": pair}, shapes, device) for pair in pairs]
    tiles = Tiles.of(BOUNDS, device)
    x = normal(tiles.stop, FEATURES)
    found: list[torch.Tensor] = []
    try:
        for kernel in (True, False):
            table = LoraTables(adapters, kernel=kernel).layer("layer")
            if table is not None:
                found.append(add_lora(x, torch.zeros_like(x), table, tiles).double())
        difference = float(((found[0] - found[1]).norm(dim=1) / found[1].norm(dim=1).clamp(min=1e-9)).max())
    except Exception as error:  # whatever a compiler, a driver or a device raises
        raise KernelFailure(f"the kernels fail here: {type(error).__name__}: {error}") from error
    if not difference <= LARGEST_ERROR[dtype]:
        raise KernelFailure(f"the kernels' numbers differ from torch's by {difference:.1e} of their magnitude")
