"""Rows of any adapters in one batch get, bit for bit, what each gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.conftest import POLICIES, Run, generation, texts

from onebase.server.engine import Engine
from onebase.server.jobs import BASE, AdamW, ForwardBackwardJob, OptimStepJob, PpoLoss, ScoreJob, ScoreRow, TrainRow
from onebase.server.worker import Worker

ADAPTERS = (*POLICIES, BASE)


def row(uid: int, tokens: Any, start: int = 3) -> ScoreRow:
    return ScoreRow(uid, tokens, start, logprobs=True, entropy=True, values=uid != BASE)


def train_rows(seed: int, count: int = 6, start: int = 3) -> list[TrainRow]:
    random = np.random.default_rng(seed)
    rows = []
    for tokens in texts(count, seed):
        floats = [random.normal(0, 1, len(tokens) - start).astype(np.float32) for _ in range(4)]
        rows.append(TrainRow(tokens, start, floats[0] * 0.1 - 4.6, *floats[1:], np.ones(len(tokens) - start, bool)))
    return rows


def test_scores_of_a_mixed_batch_equal_those_of_each_row_alone(run: Run) -> None:
    sequences = texts(12)
    mixed = run(ScoreJob(rows=[row(ADAPTERS[i % 4], t) for i, t in enumerate(sequences)]))
    for i, tokens in enumerate(sequences):
        alone = run(ScoreJob(rows=[row(ADAPTERS[i % 4], tokens)])).rows[0]
        np.testing.assert_array_equal(mixed.rows[i].logprobs, alone.logprobs)
        np.testing.assert_array_equal(mixed.rows[i].entropy, alone.entropy)
        if ADAPTERS[i % 4] != BASE:
            np.testing.assert_array_equal(mixed.rows[i].values, alone.values)


def test_adapters_differ_from_each_other_and_from_the_base(run: Run) -> None:
    tokens = texts(1)[0]
    rows = run(ScoreJob(rows=[row(uid, tokens) for uid in ADAPTERS])).rows
    for i, one in enumerate(rows):
        for other in rows[i + 1 :]:
            assert np.abs(one.logprobs - other.logprobs).max() > 1e-3


def test_completions_depend_on_their_own_request_alone(worker: Worker, run: Run) -> None:
    prompts = [t[:5] for t in texts(3)]
    kinds: list[dict[str, Any]] = [{}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}]
    together = [generation(uid, prompts, n=2, seed=i, **kinds[i]) for i, uid in enumerate(ADAPTERS)]
    for job, _ in together:
        worker.submit(job)
    for job, _ in together:
        job.done.result(60)
    for i, uid in enumerate(ADAPTERS):
        job, alone = generation(uid, prompts, n=2, seed=i, **kinds[i])
        run(job)
        assert len(alone) == 6
        assert alone == together[i][1]


def test_generated_logprobs_and_values_equal_the_scored_ones(run: Run) -> None:
    prompts = [t[:k] for k, t in enumerate(texts(5), start=1)]
    job, chunks = generation(2, prompts, n=3, values=True, seed=5, max_new_tokens=40, ignore_eos=True)
    run(job)
    for (prompt, _), [chunk] in chunks.items():
        tokens = np.concatenate([prompts[prompt], chunk.tokens])
        scored = run(ScoreJob(rows=[row(2, tokens, len(prompts[prompt]))])).rows[0]
        np.testing.assert_array_equal(np.float32(chunk.logprobs), scored.logprobs)
        np.testing.assert_array_equal(np.float32(chunk.values), scored.values)


def test_more_completions_than_places_all_come(run: Run) -> None:
    job, chunks = generation(1, [t[:4] for t in texts(4)], n=5, seed=1)
    run(job)
    assert sorted(chunks) == [(p, c) for p in range(4) for c in range(5)]


def test_the_n_completions_of_a_prompt_differ_and_one_of_n_is_the_same_alone(run: Run) -> None:
    prompt = texts(1)[0][:4]
    job, many = generation(1, [prompt], n=4, seed=3, ignore_eos=True)
    run(job)
    assert len({chunk.tokens for [chunk] in many.values()}) > 1
    job, one = generation(1, [prompt], n=1, seed=3, ignore_eos=True)
    run(job)
    assert one[0, 0] == many[0, 0]


def test_gradients_of_a_shared_pass_equal_those_of_each_policy_alone(worker: Worker, engine: Engine, run: Run) -> None:
    jobs = [ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=PpoLoss()) for uid in POLICIES]
    for job in jobs:
        worker.submit(job)
    together = [job.done.result(60) for job in jobs]
    shared = {uid: {k: g.clone() for k, g in engine.adapters[uid].gradients.items()} for uid in POLICIES}
    for uid, mixed in zip(POLICIES, together, strict=True):
        engine.adapters[uid].gradients, engine.adapters[uid].pending = {}, 0
        alone = run(ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=PpoLoss()))
        assert alone.metrics == mixed.metrics
        for name, gradient in engine.adapters[uid].gradients.items():
            np.testing.assert_array_equal(gradient.numpy(), shared[uid][name].numpy())
        assert any(gradient.abs().max() > 0 for gradient in shared[uid].values())


@pytest.mark.parametrize("trouble", ["weight decay", "clip norm", "pending gradients", "nan"])
def test_training_one_policy_leaves_the_others_bit_identical(engine: Engine, run: Run, trouble: str) -> None:
    tokens = texts(1)[0]
    others = [uid for uid in POLICIES if uid != 1]
    for uid in others:  # so that they have moments and pending gradients which could be touched
        run(ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=PpoLoss()))
        run(OptimStepJob(adapter=uid, adamw=AdamW(1e-3)))
        run(ForwardBackwardJob(adapter=uid, rows=train_rows(uid + 10), loss=PpoLoss()))

    def state() -> dict[str, np.ndarray]:
        found = {}
        for uid in others:
            adapter = engine.adapters[uid]
            assert adapter.moments is not None
            for part in (
                adapter.weights.parameters(),
                adapter.moments.exp_avg,
                adapter.moments.exp_avg_sq,
                adapter.gradients,
            ):
                found |= {
                    f"{uid}.{id(part) and name}.{len(found)}": t.detach().clone().numpy() for name, t in part.items()
                }
            found[f"{uid}.logprobs"] = run(ScoreJob(rows=[row(uid, tokens)])).rows[0].logprobs
        return found

    before, own = state(), run(ScoreJob(rows=[row(1, tokens)])).rows[0].logprobs
    rows = train_rows(1)
    if trouble == "nan":
        rows = [
            TrainRow(r.tokens, r.start, r.old_logprobs, r.old_values, r.advantages * np.inf, r.returns, r.mask)
            for r in rows
        ]
        job = ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss())
        with pytest.raises(Exception, match="not finite"):
            run(job)
    else:
        run(ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss()))
    if trouble != "nan" and trouble != "pending gradients":
        decay, clip = (0.5, 0.0) if trouble == "weight decay" else (0.0, 0.01)
        run(OptimStepJob(adapter=1, adamw=AdamW(0.1, weight_decay=decay), max_grad_norm=clip))
    after = state()
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    now = run(ScoreJob(rows=[row(1, tokens)])).rows[0].logprobs
    assert np.array_equal(own, now) == (trouble in ("nan", "pending gradients"))
