"""Whole generation, sampling included: requests of mixed lengths, more of them than there are slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench import Bench
from measure import Figure, Work
from models import add_policy, open_ours, random_ids

from onebase.server.config import Limits
from onebase.server.engine import Engine
from onebase.server.jobs import CompletionChunk, GenerateJob, Sampling
from onebase.server.worker import Worker

REQUESTS, SLOTS, ADAPTERS = 24, 8, 4
PROMPTS, COMPLETIONS = (16, 96), (8, 64)
"""Shortest and longest, in tokens."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens to write."""

    adapter: int
    tokens: list[int]
    new: int


def requests(count: int = REQUESTS, adapters: int = ADAPTERS) -> list[Request]:
    """Requests of mixed lengths, in the order in which they come."""
    random = np.random.default_rng(0)
    ids = random_ids(count, PROMPTS[1], seed=2).tolist()
    lengths = random.integers(PROMPTS[0], PROMPTS[1] + 1, count).tolist()
    new = random.integers(COMPLETIONS[0], COMPLETIONS[1] + 1, count).tolist()
    return [Request(1 + i % adapters, ids[i][: lengths[i]], new[i]) for i in range(count)]


def over_padded_generate(bench: Bench) -> Figure:
    """Plain transformers `generate`, left-padded batches of 8, over our server's loop: 24 mixed requests, 39M fp32.

    Ours has 8 slots and serves 4 adapters; the plain base has none. `detail` has PEFT's generate with `adapter_names`.
    """
    engine = open_ours("39m", "float32", kv_slots=SLOTS)
    for uid in range(1, ADAPTERS + 1):
        add_policy(engine, uid)
    work = requests()
    with working(engine) as worker:
        figure = bench.pairs(
            lambda: _padded(bench.base("39m", "float32"), work, mixed=False), lambda: generate(worker, work)
        )
        peft = bench.pairs(
            lambda: _padded(bench.peft("39m", "float32"), work, mixed=True), lambda: generate(worker, work)
        )
    detail = {**figure.detail, "over_peft_mixed_padded_generate": peft.value}
    return Figure(figure.value, figure.low, figure.high, figure.pairs, detail)


@contextlib.contextmanager
def working(engine: Engine) -> Iterator[Worker]:
    """A worker on the engine, until the block ends."""
    worker = Worker(engine, Limits())
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(drain_seconds=10.0)


def generate(worker: Worker, work: Sequence[Request], seed: int = 0) -> list[list[CompletionChunk]]:
    """Submits all requests at once and waits for them: what each of them got, logprobs included."""
    answers: list[list[CompletionChunk]] = [[] for _ in work]
    jobs = [
        GenerateJob(
            session=f"session {request.adapter}",
            adapter=request.adapter,
            prompts=[np.asarray(request.tokens, dtype=np.int64)],
            sampling=Sampling(max_new_tokens=request.new, ignore_eos=True, seed=seed),
            emit=answer.append,
            return_logprobs=True,
        )
        for request, answer in zip(work, answers, strict=True)
    ]
    for job in jobs:
        worker.submit(job)
    for job in jobs:
        job.done.result()
    return answers


@torch.no_grad()
def _padded(model: Any, work: Sequence[Request], *, mixed: bool) -> None:
    """Batches in the order of their coming; each runs until its longest completion is done."""
    for start in range(0, len(work), SLOTS):
        batch = work[start : start + SLOTS]
        longest = max(len(request.tokens) for request in batch)
        ids = torch.tensor([[0] * (longest - len(request.tokens)) + request.tokens for request in batch])
        names = {"adapter_names": [f"a{request.adapter}" for request in batch]} if mixed else {}
        model.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            do_sample=True,
            top_k=0,
            min_new_tokens=max(request.new for request in batch),
            max_new_tokens=max(request.new for request in batch),
            **names,
        )


def tenants(worker: Worker, count: int, work: Sequence[Request]) -> Work:
    """Every tenant submits the same requests at the same time, each for an adapter of its own."""
    everything = [Request(tenant, request.tokens, request.new) for request in work for tenant in range(1, count + 1)]
    return lambda: generate(worker, everything)
