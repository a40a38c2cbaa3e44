"""Whether the logprobs that Generate returns are those that Logprob computes."""

from __future__ import annotations

import numpy as np
from bench import Bench
from cases import decode
from cases.generate import Request, generate, requests, working
from measure import Figure, exactly
from models import add_policy, open_ours

from onebase.server.jobs import Floats, ScoreJob, ScoreRow, Tokens
from onebase.server.worker import Worker

SLOTS, ADAPTERS = 8, 4


def generate_against_logprob(bench: Bench) -> Figure:
    """The largest difference of Generate's logprobs from Logprob's: 24 mixed requests, 4 adapters, fp32 and bf16, 39M.

    The requests are generated side by side in 8 slots, and scored side by side in another order. `detail` has what
    being exact costs: a decode step over one with fused attention, fp32.
    """
    worst, tokens = {}, 0
    for dtype in ("float32", "bfloat16"):
        engine = open_ours("39m", dtype, kv_slots=SLOTS)
        for uid in range(1, ADAPTERS + 1):
            add_policy(engine, uid)
        work = requests(adapters=ADAPTERS)[: 8 if bench.quick else None]
        with working(engine) as worker:
            said = [chunk for answer in generate(worker, work) for chunk in answer]
            written = [np.asarray(chunk.tokens, dtype=np.int64) for chunk in said]
            scored = _logprobs(worker, work, written)
        tokens += sum(len(one) for one in written)
        worst[dtype] = max(
            float(np.abs(np.asarray(chunk.logprobs, dtype=np.float32) - again).max())
            for chunk, again in zip(said, scored, strict=True)
        )
    cost = decode.exact_over_fused(bench).value
    return exactly(max(worst.values()), tokens, {**worst, "decode_step_over_inexact": cost})


def _logprobs(worker: Worker, work: list[Request], written: list[Tokens]) -> list[Floats]:
    rows = [
        ScoreRow(one.adapter, np.concatenate([one.tokens, new]), start=len(one.tokens), logprobs=True)
        for one, new in zip(work, written, strict=True)
    ]
    job = ScoreJob(rows=rows[::-1])
    worker.submit(job)
    found = [row.logprobs for row in job.done.result().rows[::-1]]
    return [one for one in found if one is not None]
