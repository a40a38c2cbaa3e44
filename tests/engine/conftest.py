"""A worker on the oracle's tiny Llama, with three policies that differ from the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onebase.server.config import Budget, EngineConfig, Limits
from onebase.server.engine import Engine, open_engine
from onebase.server.jobs import CompletionChunk, CreateAdapterJob, GenerateJob, Job, LoraSpec, Sampling, Tokens
from onebase.server.worker import Worker

BASE = Path(__file__).parents[1] / "oracle" / "fixtures" / "base"
POLICIES = (1, 2, 3)
Run = Callable[[Job[Any]], Any]


def perturb(engine: Engine, uid: int) -> None:
    """Makes a fresh policy differ from the base."""
    random = torch.Generator().manual_seed(uid)
    with torch.no_grad():
        for name, parameter in engine.adapters[uid].weights.parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=random)
    for pair in engine.adapters[uid].weights.lora.values():
        pair.refresh()


@pytest.fixture
def engine() -> Engine:
    """An engine of its own for each test, so that no test sees another's adapters."""
    return open_engine(EngineConfig(model=str(BASE), threads=1, kv_slots=8))


@pytest.fixture
def worker(engine: Engine) -> Iterator[Worker]:
    """A running worker with POLICIES, of ranks 2, 4 and 6."""
    worker = Worker(engine, Limits(), Budget(256, 256))
    worker.start()
    for uid in POLICIES:
        spec = LoraSpec(rank=2 * uid, alpha=8.0)
        job = CreateAdapterJob(uid=uid, name=f"policy_{uid}", lora=spec, value_head=True, seed=uid)
        worker.submit(job)
        job.done.result(30)
        perturb(engine, uid)
    yield worker
    worker.stop(0.0)


@pytest.fixture
def run(worker: Worker) -> Run:
    """Submits a job and gives its result."""

    def run(job: Job[Any]) -> Any:
        worker.submit(job)
        return job.done.result(60)

    return run


def texts(count: int, seed: int = 0, shortest: int = 6, longest: int = 30) -> list[Tokens]:
    """Random token sequences of random lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(4, 100, random.integers(shortest, longest)) for _ in range(count)]


def generation(
    uid: int, prompts: list[Tokens], *, n: int = 1, values: bool = False, **sampling: Any
) -> tuple[GenerateJob, dict[tuple[int, int], list[CompletionChunk]]]:
    """A job, and where its chunks will be, by (prompt, completion)."""
    chunks: dict[tuple[int, int], list[CompletionChunk]] = {}

    def emit(chunk: CompletionChunk) -> None:
        chunks.setdefault((chunk.prompt_index, chunk.completion_index), []).append(chunk)

    stream = sampling.pop("stream_tokens", False)
    sampling = {"max_new_tokens": 12, **sampling}
    job = GenerateJob(
        adapter=uid,
        prompts=prompts,
        n=n,
        sampling=Sampling(**sampling),
        emit=emit,
        return_logprobs=True,
        return_values=values,
        stream_tokens=stream,
    )
    return job, chunks
