"""What the way over gRPC costs beside the engine."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from bench import Bench
from measure import Figure, quartiles
from models import model_dir, random_ids
from serving import served_here

from onebase.client import connect
from onebase.client import types as t
from onebase.server.config import AdapterSource, EngineConfig, ServerConfig
from onebase.server.engine import Engine

SEQUENCES, PROMPT, LENGTH = 64, 256, 512
OUTPUTS: tuple[t.ScoreOutput, ...] = ("logprobs",)


@dataclass
class EngineTime:
    """Seconds spent inside `Engine.step`."""

    cpu: float = 0.0
    wall: float = 0.0


def overhead_fraction(bench: Bench) -> Figure:
    """CPU time outside the engine over all CPU time, client and server: Score of 64 × (256+256) tokens, 39M bf16.

    A real server and a real client on loopback, in one process so that every thread's time is counted.
    """
    config = ServerConfig(
        EngineConfig(str(model_dir("39m", "bfloat16")), device="cpu", threads=1),
        port=0,
        policies=(AdapterSource("p", None),),
    )
    ids = random_ids(SEQUENCES, LENGTH).numpy()
    sequences = [t.Sequence(row[:PROMPT], row[PROMPT:]) for row in ids]
    fractions, walls = [], []
    with served_here(config) as address, connect(address) as client, client.open_session("p") as session:
        session.score(sequences[:2], outputs=OUTPUTS)
        for _ in range(bench.rounds):
            with _timed_engine() as engine:
                wall, cpu = time.perf_counter(), time.process_time()
                session.score(sequences, outputs=OUTPUTS)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            fractions.append(1 - engine.cpu / cpu)
            walls.append(1 - engine.wall / wall)
    detail = {"of_wall_time": statistics.median(walls), "engine_seconds": engine.cpu}
    return Figure(statistics.median(fractions), *quartiles(fractions), len(fractions), detail)


@contextlib.contextmanager
def _timed_engine() -> Iterator[EngineTime]:
    """Counts the time inside the engine's steps while the block runs."""
    spent, step = EngineTime(), Engine.step

    def timed(self: Engine, *arguments: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        try:
            return step(self, *arguments)
        finally:
            spent.cpu += time.thread_time() - cpu
            spent.wall += time.perf_counter() - wall

    with patch.object(Engine, "step", timed):
        yield spent
