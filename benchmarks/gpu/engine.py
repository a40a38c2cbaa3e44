"""Measures engine steps on a GPU with the adapters' products by the Triton kernels, beside the same steps by torch.

    python benchmarks/gpu/engine.py --out results.json    on a machine with a GPU, in the project's environment
    python benchmarks/gpu/engine.py --dry-run             anywhere: tiny, under Triton's interpreter, without times

Two engines on one random Llama-shaped base (see ../models.py) take each step in turn. Times are medians in
milliseconds of wall time, the host's share included, from the rows to the last hidden states: `kernels`, `torch`
(slices and stacks), and `base`, the same rows without adapters. `ratio` is torch over kernels, with its quartiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LARGEST_DIFFERENCE = {"bfloat16": 6e-2, "float32": 1e-4}
"""Of hidden states, relative to the largest of them."""

TOKEN = 5


@dataclass(frozen=True)
class Case:
    """A batch with so many rows of each adapter."""

    name: str
    adapters: int
    rows: int
    tokens: int  # of each row
    past: int = 0  # tokens of each row that are in the cache; 0 is a prefill


CASES = (
    Case("decode 8×1 after 128", 8, 1, 1, 128),
    Case("decode 8×4 after 128", 8, 4, 1, 128),
    Case("decode 32×1 after 128", 32, 1, 1, 128),
    Case("prefill 1×1×1024", 1, 1, 1024),
    Case("prefill 8×1×128", 8, 1, 128),
    Case("prefill 8×4×128", 8, 4, 128),
)
TINY = (Case("decode 3×1 after 6", 3, 1, 1, 6), Case("prefill 2×1×20", 2, 1, 20))


class Bench:
    """The two engines with the same adapters.

    Args:
        base: one of the bases of ../models.py.
        dtype: the base's.
        device: where they are.
        adapters: how many policies each has.
    """

    def __init__(self, base: str, dtype: str, device: torch.device, adapters: int) -> None:
        from models import add_policy, model_dir

        from onebase.server.config import EngineConfig
        from onebase.server.engine import open_engine

        self.device, self.dtype = device, dtype
        path = str(model_dir(base, dtype))
        self.engines = {
            side: open_engine(EngineConfig(path, device=str(device), exact="off", kernels=kernels))
            for side, kernels in (("kernels", "on"), ("torch", "off"))
        }
        self.policies = {
            side: [add_policy(engine, uid) for uid in range(1, adapters + 1)] for side, engine in self.engines.items()
        }

    def work(self, case: Case, side: str, *, base: bool = False) -> Callable[[], torch.Tensor]:
        """One step of the case; it may be repeated. Rows that go on find their past in the cache."""
        from models import random_ids

        from onebase.server.engine.batch import Row

        engine, count = self.engines[side], case.adapters * case.rows
        weights = [None if base else self.policies[side][place // case.rows] for place in range(count)]
        ids = random_ids(count, max(case.past, case.tokens)).tolist()

        @torch.no_grad()
        def step(rows: list[Row]) -> torch.Tensor:
            return engine.forward(rows)[1]

        if not case.past:
            return lambda: step([Row(w, row) for w, row in zip(weights, ids, strict=True)])
        slots = [engine.kv.take() for _ in ids]
        step([Row(w, row, slot=slot) for w, row, slot in zip(weights, ids, slots, strict=True)])
        for slot in slots:
            engine.kv.give_back(slot)  # the next work takes them again, and fills them anew
        return lambda: step([Row(w, [TOKEN], case.past, slot) for w, slot in zip(weights, slots, strict=True)])

    def clock(self) -> float:
        """Seconds of wall time, when the device has done what it was told."""
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def measure(self, case: Case) -> dict[str, Any]:
        """One case's row of the result.

        Raises:
            SystemExit: if the two sides differ by more than rounding.
        """
        from measure import Effort, pairs

        kernels, plain = self.work(case, "kernels"), self.work(case, "torch")
        ours, theirs = kernels().float(), plain().float()
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if not difference <= LARGEST_DIFFERENCE[self.dtype]:
            raise SystemExit(f"{case.name}: the sides differ by {difference:.1e}")
        result: dict[str, Any] = {**dataclasses.asdict(case), "difference": difference}
        if self.device.type == "cuda":
            effort = Effort(pairs=50)
            ratio = pairs(plain, kernels, effort, self.clock)
            base = pairs(self.work(case, "torch", base=True), kernels, effort, self.clock)
            result["ratio"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "pairs": ratio.pairs}
            result["ms"] = {
                "kernels": 1e3 * ratio.detail["second_seconds"],
                "torch": 1e3 * ratio.detail["first_seconds"],
                "base": 1e3 * base.detail["first_seconds"],
            }
        return result


def main() -> None:
    """Parses the arguments, measures, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes; standard output gets it in any case")
    parser.add_argument("--base", default="1.1b", help="a base of benchmarks/models.py")
    parser.add_argument("--dry-run", action="store_true", help="a tiny base under Triton's interpreter, without times")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here: try --dry-run")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    base, dtype, cases = ("tiny", "float32", TINY) if arguments.dry_run else (arguments.base, "bfloat16", CASES)
    bench = Bench(base, dtype, device, max(case.adapters for case in cases))
    result = {
        "machine": platform.machine() if arguments.dry_run else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "base": base,
        "dtype": dtype,
        "steps": [bench.measure(case) for case in cases],
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
