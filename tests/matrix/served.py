"""What the server's engine says of a case: loaded as `onebase serve` loads it, asked through the worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matrix.cases import CONTEXT
from matrix.work import ADAMW, LOSS, MAX_GRAD_NORM, NEW_TOKENS, PASS, PROMPTS, TEXTS, Greedy, Scores, Trained

from onebase.server.config import Budget, EngineConfig, Limits
from onebase.server.engine import Engine, open_engine
from onebase.server.jobs import (
    BASE,
    AdamW,
    AdapterKind,
    CompletionChunk,
    ForwardBackwardJob,
    GenerateJob,
    Job,
    LoadAdapterJob,
    OptimStepJob,
    PpoLoss,
    Sampling,
    ScoreJob,
    ScoreRow,
    TrainRow,
)
from onebase.server.worker import Worker

POLICY, REWARD = 1, 2
BUDGET = Budget(step_tokens=16, train_tokens=64)
"""So small that long prompts come in chunks and a pass in micro-batches."""


class Served:
    """A running worker on a case's base, with its policy and its reward."""

    def __init__(self, engine: Engine, worker: Worker) -> None:
        self.architecture = engine.facts.architecture
        self.exact = engine.facts.exact
        self._engine = engine
        self._worker = worker

    def load(self, place: Path, *, reward: bool) -> None:
        """Loads the adapters that PEFT saved."""
        self._run(LoadAdapterJob(uid=POLICY, name="policy", kind=AdapterKind.POLICY, path=place / "policy"))
        if reward:
            self._run(LoadAdapterJob(uid=REWARD, name="reward", kind=AdapterKind.REWARD, path=place / "reward"))

    def scores(self, adapter: int) -> list[Scores]:
        """Of TEXTS, without a cache; values where the adapter has a value head."""
        wanted = {"logprobs": True, "entropy": True, "values": adapter == POLICY}
        rows = [ScoreRow(adapter, np.array(text.tokens), text.start, **wanted) for text in TEXTS]
        return [Scores(row.logprobs, row.entropy, row.values) for row in self._run(ScoreJob(rows=rows)).rows]

    def rewards(self) -> list[float]:
        """Of TEXTS."""
        rows = [ScoreRow(REWARD, np.array(text.tokens), score=True) for text in TEXTS]
        return [float(row.scores[0]) for row in self._run(ScoreJob(rows=rows)).rows if row.scores is not None]

    def greedy(self) -> dict[int, list[Greedy]]:
        """Completions of PROMPTS by base and policy, side by side in the cache."""
        found: dict[int, list[Greedy]] = {BASE: [], POLICY: []}
        jobs = {uid: self._generation(uid) for uid in found}
        for job, _ in jobs.values():
            self._worker.submit(job)
        for uid, (job, chunks) in jobs.items():
            job.done.result(120)
            for prompt in range(len(PROMPTS)):
                own = [chunk for chunk in chunks if chunk.prompt_index == prompt]
                tokens = [token for chunk in own for token in chunk.tokens]
                found[uid].append(Greedy(tokens, np.array([lp for chunk in own for lp in chunk.logprobs])))
        return found

    def train(self) -> Trained:
        """One ForwardBackward over PASS and one OptimStep; the policy is another afterwards."""
        rows = [
            TrainRow(
                tokens=np.array(row.text.tokens),
                start=row.text.start,
                old_logprobs=row.old_logprobs,
                old_values=row.old_values,
                advantages=row.advantages,
                returns=row.returns,
                mask=np.ones(len(row.advantages), dtype=bool),
            )
            for row in PASS
        ]
        loss = PpoLoss(**LOSS, ratio_threshold=1e6)
        metrics = self._run(ForwardBackwardJob(adapter=POLICY, rows=rows, loss=loss)).metrics
        gradients = {name: g.double().numpy() for name, g in self._engine.adapter(POLICY).gradients.items()}
        beta1, beta2 = ADAMW["betas"]
        settings = AdamW(ADAMW["lr"], beta1, beta2, ADAMW["eps"], ADAMW["weight_decay"])
        step = self._run(OptimStepJob(adapter=POLICY, adamw=settings, max_grad_norm=MAX_GRAD_NORM))
        parameters = self._engine.adapter(POLICY).weights.parameters()
        return Trained(
            losses=np.array([metrics["loss/policy"], metrics["loss/value"]]),
            gradients=gradients,
            grad_norm=step.grad_norm,
            parameters={name: p.detach().double().numpy() for name, p in parameters.items()},
            after=self.scores(POLICY),
        )

    def _generation(self, uid: int) -> tuple[GenerateJob, list[CompletionChunk]]:
        chunks: list[CompletionChunk] = []
        sampling = Sampling(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, temperature=0.0)
        prompts = [np.array(prompt) for prompt in PROMPTS]
        job = GenerateJob(adapter=uid, prompts=prompts, sampling=sampling, emit=chunks.append, return_logprobs=True)
        return job, chunks

    def _run(self, job: Job[Any]) -> Any:
        self._worker.submit(job)
        return job.done.result(120)


@contextmanager
def serve(base: Path) -> Iterator[Served]:
    """Loads a base and runs a worker on it.

    Raises:
        FailedPrecondition: the base is refused.
    """
    config = EngineConfig(model=str(base), device="cpu", dtype="float32", threads=1, kv_slots=8, max_context=CONTEXT)
    engine = open_engine(config)
    worker = Worker(engine, Limits(), BUDGET)
    worker.start()
    try:
        yield Served(engine, worker)
    finally:
        worker.stop(0.0)
