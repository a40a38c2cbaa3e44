"""How cost grows: with adapters, tenants, context and rank. 39M fp32, one thread, CPU time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench import Bench, Ours
from cases.decode import base_decode, our_decode
from cases.generate import Request, tenants, working
from measure import Effort, Figure, pairs, quartiles, timed
from models import add_policy, open_ours, random_ids

MODEL, DTYPE = "39m", "float32"
ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
TENANTS = (1, 2, 4, 8, 16)
CONTEXTS = (64, 128, 256, 512, 1024)
RANKS = (4, 8, 16, 32, 64, 128)
STEPS = 4
"""Decode steps of one measurement."""


@dataclass(frozen=True)
class Line:
    """One line of a plot: the value at each x, with quartiles."""

    label: str
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """Lines over one axis."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Sequence[Line]


def by_adapters(bench: Bench, effort: Effort) -> Plot:
    """64 rows of 1 to 64 adapters."""
    engine = bench.once(open_ours, MODEL, DTYPE)
    policies = [add_policy(engine, uid) for uid in range(1, ADAPTERS[-1] + 1)]
    rows = ADAPTERS[-1]

    def at(count: int) -> tuple[Figure, Figure]:
        return _prefill_and_decode(bench, Ours(engine, policies[:count]), (rows, 16), rows, effort)

    lines = _two_lines(f"prefill, {rows} × 16 tokens", f"decode, {rows} rows", [at(count) for count in ADAPTERS])
    return Plot("adapters", "Cost of a mixed step", "adapters", "cost over the plain base", ADAPTERS, lines)


def by_rank(bench: Bench, effort: Effort) -> Plot:
    """Eight adapters of rank 4 to 128."""

    def at(rank: int) -> tuple[Figure, Figure]:
        engine = open_ours(MODEL, DTYPE)
        ours = Ours(engine, [add_policy(engine, uid, rank) for uid in range(1, 9)])
        return _prefill_and_decode(bench, ours, (8, 128), 8, effort)

    lines = _two_lines("prefill, 8 × 128 tokens", "decode, 8 rows", [at(rank) for rank in RANKS])
    return Plot("rank", "Cost of a step of 8 adapters", "rank", "cost over the plain base", RANKS, lines)


def by_context(bench: Bench, effort: Effort) -> Plot:
    """Eight rows of 64 to 1024 tokens."""
    ours = bench.ours(MODEL, DTYPE)

    def at(length: int) -> tuple[Figure, Figure]:
        return _prefill_and_decode(bench, ours, (1, length), 8, effort, length)

    found = [at(length) for length in CONTEXTS]
    lines = _two_lines("prefill of one row", "decode, 8 rows", found)
    return Plot(
        "context", "Cost of a step of 8 adapters", "tokens of context", "cost over the plain base", CONTEXTS, lines
    )


def by_tenants(bench: Bench, effort: Effort) -> Plot:
    """Tenants with a policy each that generate at the same time, through the server's loop."""
    engine = bench.once(open_ours, MODEL, DTYPE)
    for uid in range(1, TENANTS[-1] + 1):
        if uid not in engine.adapters:
            add_policy(engine, uid)
    ids = random_ids(4, 64).tolist()
    work = [Request(1, row, 32) for row in ids]
    values, lows, highs = [], [], []
    with working(engine) as worker:
        for count in TENANTS:
            run = tenants(worker, count, work)
            run()
            times = [timed(run) * 1000 / (count * len(work) * 32) for _ in range(min(3, effort.pairs))]
            low, high = quartiles(times)
            values.append(sorted(times)[len(times) // 2])
            lows.append(low)
            highs.append(high)
    line = Line("4 prompts of 64 tokens each, 32 tokens written", values, lows, highs)
    return Plot("tenants", "Generation for several tenants", "tenants", "CPU ms per written token", TENANTS, [line])


PLOTS: Sequence[Callable[[Bench, Effort], Plot]] = (by_adapters, by_tenants, by_context, by_rank)


def _prefill_and_decode(
    bench: Bench, ours: Ours, prefill: tuple[int, int], rows: int, effort: Effort, context: int = 64
) -> tuple[Figure, Figure]:
    """Our cost over the plain base's: a prefill of (rows, tokens), and decode steps of some rows after a context."""
    model, ids = bench.base(MODEL, DTYPE).model, random_ids(*prefill)

    @torch.no_grad()
    def theirs() -> object:
        return model(input_ids=ids, use_cache=False)

    first = pairs(lambda: ours.forward(ours.rows(ids)), theirs, effort)
    prompts = random_ids(rows, context)
    slots = [ours.engine.kv.take() for _ in prompts]
    try:
        work = our_decode(ours, prompts, slots, STEPS)
        return first, pairs(work, base_decode(bench, MODEL, DTYPE, prompts, STEPS), effort)
    finally:
        for slot in slots:
            ours.engine.kv.give_back(slot)


def _two_lines(first: str, second: str, found: Sequence[tuple[Figure, Figure]]) -> list[Line]:
    return [
        Line(label, *(tuple(getattr(pair[at], key) for pair in found) for key in ("value", "low", "high")))
        for at, label in enumerate((first, second))
    ]
