"""What durability costs: steps per second of one policy without a state, with checkpoints, with each step durable.

    python benchmarks/durability.py [--folder DIR]     # DIR: where the state lies, for its disk's sake

The base has the shape of examples/sentiment's, with random weights; a step is one ForwardBackward of 16 sequences of 48
tokens and one OptimStep, as in `policy_1.yaml`. Everything runs on one thread, alone on the machine, please.
"""

from __future__ import annotations

import os
import shutil
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
from transformers import LlamaConfig, LlamaForCausalLM

from onebase.client import AdamW, LoraSpec, PpoLoss, Session, TrainingSequence, connect

TOKENIZER = Path(__file__).parents[1] / "tests" / "oracle" / "fixtures" / "base"
WAYS = {
    "no --state": (),
    "--durability checkpoint": ("--durability", "checkpoint"),
    "--durability step": ("--durability", "step"),
}
ROUNDS, STEPS, WARM = 5, 8, 2


def make_base(path: Path) -> None:
    """A Llama of the shape of examples/sentiment, with a tokenizer that comes with the tests."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=1200, tie_word_embeddings=True, max_position_embeddings=128)
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path)


def batch() -> list[TrainingSequence]:
    """16 sequences of 16 + 32 tokens."""
    random = np.random.default_rng(0)
    numbers = np.zeros(32, dtype=np.float32)
    return [
        TrainingSequence(
            prompt=random.integers(5, 60, 16),
            completion=random.integers(5, 60, 32),
            old_logprobs=numbers - 4,
            old_values=numbers,
            advantages=random.standard_normal(32).astype(np.float32),
            returns=numbers,
        )
        for _ in range(16)
    ]


def seconds_per_step(session: Session, steps: int) -> tuple[float, float]:
    """Of a whole step, and of its OptimStep alone."""
    rows, loss, inside = batch(), PpoLoss(), 0.0
    began = time.perf_counter()
    for _ in range(steps):
        session.forward_backward(rows, loss)
        before = time.perf_counter()
        session.optim_step(AdamW(learning_rate=1e-4))
        inside += time.perf_counter() - before
    return (time.perf_counter() - began) / steps, inside / steps


def main(folder: Annotated[Path | None, typer.Option(help="Where the states lie.")] = None) -> None:
    """Prints the medians, the ways taking turns."""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        here = Path(directory)
        make_base(here / "base")
        found: dict[str, list[tuple[float, float]]] = {}
        servers, sessions = [], {}
        try:
            for number, (way, flags) in enumerate(WAYS.items()):
                port = here / f"port{number}"
                state = ("--state", str(here / f"state{number}"), *flags) if flags else ()
                command = [sys.executable, "-m", "onebase.client.cli", "serve", str(here / "base"), *state]
                command += ["--port", "0", "--port-file", str(port), "--threads", "1"]
                servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
                while not port.exists():
                    time.sleep(0.1)
                session = connect(f"127.0.0.1:{port.read_text().strip()}").open_session()
                session.create_adapter("p", LoraSpec(rank=16, alpha=32))
                session.set_active("p")
                seconds_per_step(session, WARM)
                sessions[way] = session
            for _ in range(ROUNDS):
                for way, session in sessions.items():
                    found.setdefault(way, []).append(seconds_per_step(session, STEPS))
        finally:
            for server in servers:
                server.kill()
        size = sum(file.stat().st_size for file in next((here / "state2" / "checkpoints").iterdir()).iterdir())
        print(f"a checkpoint is {size / 2**20:.1f} MiB")
    for way, rounds in found.items():
        whole, inside = (statistics.median(one) for one in zip(*rounds, strict=True))
        print(f"{way:24} {1 / whole:6.1f} steps/s   OptimStep {inside * 1000:6.1f} ms")


if __name__ == "__main__":
    typer.run(main)
