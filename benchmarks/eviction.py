"""What it costs that an adapter comes back: a call that needs an evicted adapter, and the same call just after it.

    python benchmarks/eviction.py [--folder DIR]     # DIR: where the state lies, for its disk's sake

The base has the shape of examples/sentiment's, with random weights; a call is one Logprob of 16 + 32 tokens over gRPC.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="160")

import numpy as np
import typer
from durability import make_base, seconds_per_step

from onebase.client import LoraSpec, Sequence, Session, connect

ROUNDS = 12
RANKS = (16, 256)


def call_seconds(session: Session) -> float:
    """Of one call."""
    ids = np.arange(5, 53)
    began = time.perf_counter()
    session.logprob(Sequence(ids[:16], ids[16:]))
    return time.perf_counter() - began


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.1f} ms (least {min(seconds) * 1000:.1f})"


def main(folder: Annotated[Path | None, typer.Option(help="Where the state lies.")] = None) -> None:
    """Prints the medians and the least of each adapter."""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        here = Path(directory)
        make_base(here / "base")
        port = here / "port"
        command = [sys.executable, "-m", "onebase.client.cli", "serve", str(here / "base"), "--state", str(here / "s")]
        command += ["--port", "0", "--port-file", str(port), "--threads", "1", "--adapter-memory", "1"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not port.exists():
                time.sleep(0.1)
            client = connect(f"127.0.0.1:{port.read_text().strip()}")
            for rank in RANKS:
                session = client.open_session()
                name = f"rank-{rank}"
                session.create_adapter(name, LoraSpec(rank=rank, alpha=32))
                session.set_active(name)
                seconds_per_step(session, 1)  # it has moments now
                size = client.adapter(name).total_bytes
                away, there = [], []
                for _ in range(ROUNDS):
                    while client.adapter(name).resident:
                        time.sleep(0.1)
                    away.append(call_seconds(session))
                    there.append(call_seconds(session))
                print(f"{name}: {size / 2**20:.1f} MiB in memory; away {_ms(away)}, there {_ms(there)}")
                session.delete_adapter(name)
        finally:
            server.kill()


if __name__ == "__main__":
    typer.run(main)
