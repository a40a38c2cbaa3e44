"""The Triton kernels: what they compute, under the interpreter, and what the compiler makes of them for a GPU."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.kernels.layers import CPU
from support import environment

from onebase.server.engine.kernels import AdapterEntries, LoraTables, Tiles
from onebase.server.engine.kernels.table import FIELDS, LARGE_TILE, SMALL_TILE, Launch, LoraTable
from onebase.server.engine.lora import LoraPair

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

SHARED_BYTES = 99 * 1024
"""Shared memory of a block on the smallest GPUs since Ampere (CUDA C++ Programming Guide, compute capabilities)."""

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", int: "i32"}


@pytest.mark.parametrize("file", ["interpreted.py", "wired.py"])
def test_interpreted(file: str) -> None:
    """Triton decides when it is imported whether it interprets, so these tests have a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    ran = subprocess.run(
        command, env=environment() | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^\d\d passed", ran.stdout, re.MULTILINE), ran.stdout


def dry(script: str, out: Path) -> Any:
    """What a benchmark of GPUs writes without one."""
    command = [sys.executable, str(Path(__file__).parents[3] / "benchmarks" / "gpu" / script), "--dry-run", "--out"]
    subprocess.run([*command, str(out)], env=environment(), stdout=subprocess.DEVNULL, check=True, timeout=240)
    return json.loads(out.read_text())


def test_the_benchmark_of_layers_runs_dry(tmp_path: Path) -> None:
    shapes = dry("segmented_lora.py", tmp_path / "out.json")["shapes"]
    assert [sorted(shape["error"]) for shape in shapes] == [["exact", "kernel", "torch"]] * 2


def test_the_benchmark_of_engine_steps_runs_dry(tmp_path: Path) -> None:
    steps = dry("engine.py", tmp_path / "out.json")["steps"]
    assert [step["past"] > 0 for step in steps] == [True, False]
    assert all(0 < step["difference"] < 1e-4 for step in steps)


def table(dtype: torch.dtype, rank_block: int, in_features: int, out_features: int) -> LoraTable:
    launch = Launch(dtype, rank_block, rank_multiple=16 // dtype.itemsize, aligned=True)
    return LoraTable((), torch.empty(0, FIELDS), launch, in_features, out_features, rank_block, kernel=True)


class Launched:
    """Stands for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.values: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *values: Any, num_warps: int, num_stages: int, **named: Any) -> None:
        self.values = dict(zip(self.kernel.arg_names, values, strict=False)) | named
        self.options = {"num_warps": num_warps, "num_stages": num_stages}

    def compiled(self, arch: int) -> Any:
        """The kernel as it was launched, for an architecture; needs no GPU."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, whole = {}, {}
        constants = {p.name: self.values[p.name] for p in self.kernel.params if p.is_constexpr}
        for at, name in enumerate(self.kernel.arg_names):
            value = self.values[name]
            signature[name] = "constexpr" if name in constants else TYPES[getattr(value, "dtype", int)]
            if name not in constants and (not isinstance(value, int) or value % 16 == 0):
                whole[(at,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, whole)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


@pytest.mark.parametrize(
    ("dtype", "rows", "arch"),
    [(torch.bfloat16, 1, 90), (torch.bfloat16, 64, 90), (torch.bfloat16, 64, 80), (torch.float32, 64, 90)],
)
def test_compiled_kernels_fit_and_move_16_bytes_at_a_time(
    dtype: torch.dtype, rows: int, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from onebase.server.engine.kernels import segmented_lora

    shrink, expand = Launched(segmented_lora.shrink), Launched(segmented_lora.expand)
    monkeypatch.setattr(segmented_lora, "shrink", shrink)
    monkeypatch.setattr(segmented_lora, "expand", expand)
    for rank in (16, 256):
        a, b = torch.zeros(rank, 4096, dtype=dtype), torch.zeros(2048, rank, dtype=dtype)
        entries = AdapterEntries({"layer": LoraPair(a, b, 1.0, a, b)}, {"layer": (4096, 2048)}, CPU)
        table = LoraTables([entries]).layer("layer")
        x, y = torch.zeros(rows, 4096, dtype=dtype), torch.zeros(rows, 2048, dtype=dtype)
        segmented_lora.add_lora_(x, y, table, Tiles.of([(0, rows)], CPU))
        shrunk, expanded = shrink.compiled(arch), expand.compiled(arch)
        assert max(shrunk.metadata.shared, expanded.metadata.shared) <= SHARED_BYTES
        assert "cp.async.cg" in shrunk.asm["ptx"]  # 16 bytes at a time, past the L1 cache
        assert "cp.async.ca" not in shrunk.asm["ptx"]  # fewer
        # Entries and tiles are single numbers of 32 and 64 bits; y, B and the low-rank sums come in vectors.
        assert "ld.global.v4.b32" in expanded.asm["ptx"]
        assert not re.search(r"(ld|st)\.global\.[bu]16", expanded.asm["ptx"])
        assert "cp.async" not in expanded.asm["ptx"]


def test_the_order_of_sums_does_not_depend_on_other_adapters() -> None:
    from onebase.server.engine.kernels.segmented_lora import blocks_for

    for rows, in_features in itertools.product((SMALL_TILE, LARGE_TILE), (40, 1000, 4096, 14336)):
        cuts = [blocks_for(rows, table(torch.bfloat16, rank_block, in_features, 512)) for rank_block in (16, 64, 128)]
        assert len({(cut.inputs, cut.split) for cut in cuts}) == 1


def test_no_part_of_split_inputs_is_without_work() -> None:
    from onebase.server.engine.kernels.segmented_lora import blocks_for

    for rows, in_features in itertools.product((SMALL_TILE, LARGE_TILE), (1, 40, 1000, 4096, 14336, 100_000)):
        cut = blocks_for(rows, table(torch.float32, 16, in_features, 512))
        assert (cut.split - 1) * cut.inputs < in_features
