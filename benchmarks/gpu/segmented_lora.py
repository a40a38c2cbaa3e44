"""Measures the segmented LoRA kernel on a GPU: its error, whether a row's bits depend on the batch, and its time.

    python benchmarks/gpu/segmented_lora.py --out results.json    on a machine with a GPU
    python benchmarks/gpu/segmented_lora.py --sweep               also other cuts of the work, one change at a time
    python benchmarks/gpu/segmented_lora.py --dry-run             anywhere: tiny shapes under Triton's interpreter

Needs torch and Triton only, not the engine's other dependencies. Times are medians in milliseconds: `eager` as the host
launches it, `graph` replayed from a CUDA graph, without the host's share. Sides: `kernel` (the update alone), `exact`
(the same with one tile size for all rows), `torch` (two products for each adapter in turn), `base` (the layer's own
product, which the update comes on top of).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SERVER = Path(__file__).parents[2] / "server"
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A batch of one layer: adapters of equal rank and equal numbers of rows."""

    name: str
    adapters: int
    rows: int  # of each adapter
    in_features: int
    out_features: int
    rank: int = 16
    dtype: str = "bfloat16"


SHAPES = (
    Shape("decode 8×1, 1024→1024", 8, 1, 1024, 1024),
    Shape("decode 8×1, 4096→4096", 8, 1, 4096, 4096),
    Shape("decode 8×4, 4096→4096", 8, 4, 4096, 4096),
    Shape("decode 64×1, 4096→4096", 64, 1, 4096, 4096),
    Shape("decode 8×1, 4096→14336", 8, 1, 4096, 14336),
    Shape("decode 8×1, 14336→4096", 8, 1, 14336, 4096),
    Shape("decode 8×1, 4096→4096, rank 64", 8, 1, 4096, 4096, rank=64),
    Shape("decode 8×1, 4096→4096, float32", 8, 1, 4096, 4096, dtype="float32"),
    Shape("prefill 8×128, 1024→1024", 8, 128, 1024, 1024),
    Shape("prefill 1×512, 4096→4096", 1, 512, 4096, 4096),
    Shape("prefill 8×512, 4096→4096", 8, 512, 4096, 4096),
    Shape("prefill 8×512, 4096→14336", 8, 512, 4096, 14336),
    Shape("prefill 8×512, 14336→4096", 8, 512, 14336, 4096),
    Shape("prefill 8×512, 4096→4096, rank 128", 8, 512, 4096, 4096, rank=128),
    Shape("prefill 4×128, 4096→4096, float32", 4, 128, 4096, 4096, dtype="float32"),
)
TINY = (
    Shape("decode 3×1, 48→40", 3, 1, 48, 40),
    Shape("prefill 2×20, 48→40, rank 4, float32", 2, 20, 48, 40, rank=4, dtype="float32"),
)


@dataclass(frozen=True)
class Pair:
    """One adapter's update of the layer, without gradients."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def compute_a(self) -> torch.Tensor:
        """What the products use."""
        return self.a

    @property
    def compute_b(self) -> torch.Tensor:
        """What the products use."""
        return self.b


def import_kernels() -> Any:
    """The kernels' package without the engine's own imports, which a bare GPU machine may not be able to follow."""
    path = SERVER
    for name in ("onebase", "onebase.server", "onebase.server.engine"):
        path = path / name.rpartition(".")[2]
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    from onebase.server.engine import kernels
    from onebase.server.engine.kernels import reference, segmented_lora

    return types.SimpleNamespace(
        AdapterEntries=kernels.AdapterEntries, LoraTables=kernels.LoraTables, Tiles=kernels.Tiles,
        available=kernels.available, torch=reference, triton=segmented_lora,
    )  # fmt: skip


class Case:
    """A shape with random numbers on a device."""

    def __init__(self, kernels: Any, shape: Shape, device: torch.device) -> None:
        random = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[shape.dtype]

        def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=random, device=device) * scale).to(dtype)

        self.kernels = kernels
        self.pairs = [
            Pair(
                normal(shape.rank, shape.in_features, shape.in_features**-0.5),
                normal(shape.out_features, shape.rank, shape.rank**-0.5),
                0.5 + place,
            )
            for place in range(shape.adapters)
        ]
        self.bounds = [(place * shape.rows, (place + 1) * shape.rows) for place in range(shape.adapters)]
        self.x = normal(shape.adapters * shape.rows, shape.in_features)
        self.y = normal(shape.adapters * shape.rows, shape.out_features)
        self.weight = normal(shape.out_features, shape.in_features)
        shapes = {"layer": (shape.in_features, shape.out_features)}
        entries = [kernels.AdapterEntries({"layer": pair}, shapes, device) for pair in self.pairs]
        self.table = kernels.LoraTables(entries).layer("layer")
        self.tiles = kernels.Tiles.of(self.bounds, device)
        self.exact = kernels.Tiles.of(self.bounds, device, exact=True)

    def updated(self, module: Any, tiles: Any, *more: Any) -> torch.Tensor:
        """A new y, updated by the kernel's module or torch's."""
        y = self.y.clone()
        module.add_lora_(self.x, y, self.table, tiles, *more)
        return y

    def error(self, y: torch.Tensor) -> float:
        """The largest relative error of a row against float64."""
        expected = self.y.double()
        for pair, (start, stop) in zip(self.pairs, self.bounds, strict=True):
            low = self.x[start:stop].double() @ pair.a.double().t()
            expected[start:stop] += pair.scaling * low @ pair.b.double().t()
        return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())

    def invariant(self) -> bool:
        """Whether each adapter's last row has the same bits in the whole batch and alone in it (exact tiles)."""
        whole = self.updated(self.kernels.triton, self.exact)
        alone = self.kernels.Tiles.of([(stop - 1, stop) for _, stop in self.bounds], self.x.device, exact=True)
        last = [stop - 1 for _, stop in self.bounds]
        return bool(self.updated(self.kernels.triton, alone)[last].equal(whole[last]))

    def sides(self) -> dict[str, Callable[[], object]]:
        """What is timed. y grows with every call, which no time depends on."""
        x, y, table = self.x, torch.zeros_like(self.y), self.table
        triton, plain = self.kernels.triton, self.kernels.torch
        return {
            "kernel": lambda: triton.add_lora_(x, y, table, self.tiles),
            "exact": lambda: triton.add_lora_(x, y, table, self.exact),
            "torch": lambda: plain.add_lora_(x, y, table, self.tiles),
            "base": lambda: torch.nn.functional.linear(x, self.weight),
        }


def variations(cut: Any) -> Iterator[Any]:
    """The cut with one number changed."""
    choices = {
        "inputs": (32, 64, 128, 256),
        "split": (1, 2, 4, 8, 16),
        "outputs": (32, 64, 128, 256),
        "warps": (2, 4, 8),
        "stages": (2, 3, 4),
    }
    for name, values in choices.items():
        for value in values:
            if value != getattr(cut, name):
                yield dataclasses.replace(cut, **{name: value})


def sweep(case: Case) -> list[dict[str, Any]]:
    """Graph times of the default cut and its variations, fastest first; without those that do not fit the device."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    triton = case.kernels.triton
    default = triton.blocks_for(case.tiles.lists[0].block, case.table)
    y, found = torch.zeros_like(case.y), []
    for cut in (default, *variations(default)):
        try:
            time = do_bench_cudagraph(
                lambda cut=cut: triton.add_lora_(case.x, y, case.table, case.tiles, cut), return_mode="median"
            )
        except (CompilationError, OutOfResources):
            continue
        found.append({"ms": time, "default": cut == default, **dataclasses.asdict(cut)})
    return sorted(found, key=lambda one: float(one["ms"]))


def measure(kernels: Any, shape: Shape, device: torch.device, with_sweep: bool) -> dict[str, Any]:
    """One shape's row of the result.

    Raises:
        SystemExit: if the kernel's error is too large for its dtype, or the same batch gives other bits.
    """
    case = Case(kernels, shape, device)
    after = case.updated(kernels.triton, case.tiles)
    result: dict[str, Any] = {**dataclasses.asdict(shape), "error": {"kernel": case.error(after)}}
    result["error"]["exact"] = case.error(case.updated(kernels.triton, case.exact))
    result["error"]["torch"] = case.error(case.updated(kernels.torch, case.tiles))
    result["batch_invariant_when_exact"] = case.invariant()
    if max(result["error"]["kernel"], result["error"]["exact"]) > LARGEST_ERROR[DTYPES[shape.dtype]]:
        raise SystemExit(f"{shape.name}: errors {result['error']}")
    if not after.equal(case.updated(kernels.triton, case.tiles)):
        raise SystemExit(f"{shape.name}: two runs differ")
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        result["eager"] = {name: do_bench(side, return_mode="median") for name, side in case.sides().items()}
        result["graph"] = {name: do_bench_cudagraph(side, return_mode="median") for name, side in case.sides().items()}
        if with_sweep:
            result["sweep"] = sweep(case)
    return result


def main() -> None:
    """Parses the arguments, measures, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; standard output gets it in any case")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under Triton's interpreter, without times")
    parser.add_argument("--sweep", action="store_true", help="also time other cuts of the work")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    kernels = import_kernels()
    if not kernels.available(device):
        raise SystemExit(f"the kernels do not run on {device} here: try --dry-run")
    import triton

    shapes = TINY if arguments.dry_run else SHAPES
    result = {
        "machine": platform.machine() if arguments.dry_run else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "shapes": [measure(kernels, shape, device, arguments.sweep) for shape in shapes],
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
