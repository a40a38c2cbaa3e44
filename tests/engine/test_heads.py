"""Scores of several labels, where they are read, and logits: bit for bit what they are alone, in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.conftest import Run, perturb, texts

from onebase.server.engine import Engine
from onebase.server.engine.adapters import Head
from onebase.server.jobs import BASE, AdapterKind, CreateAdapterJob, LoraSpec, RowResult, ScoreJob, ScoreRow, Tokens

REWARDS = {11: 1, 12: 3, 13: 20}
"""Labels by uid; 20 are more than the columns to which a head is padded."""


@pytest.fixture
def rewards(engine: Engine, run: Run) -> None:
    """Reward adapters beside the policies, with biases but for one."""
    for uid, labels in REWARDS.items():
        random = torch.Generator().manual_seed(uid)
        run(CreateAdapterJob(uid=uid, name=f"reward_{uid}", lora=LoraSpec(rank=4), value_head=False, seed=uid))
        perturb(engine, uid)
        adapter = engine.adapters[uid]
        adapter.kind = AdapterKind.REWARD
        bias = torch.randn(labels, generator=random) if labels > 1 else None
        adapter.weights.score_head = Head(torch.randn(labels, engine.facts.hidden_size, generator=random), bias)


def mixed(sequences: list[Tokens]) -> list[ScoreRow]:
    """Rows of rewards, policies and the base; those of rewards are read at their last token or before it."""
    rows: list[ScoreRow] = []
    for i, tokens in enumerate(sequences):
        uid = list(REWARDS)[i % 3]
        rows.append(ScoreRow(uid, tokens, score=True, token_scores=bool(i % 2), score_at=-1 - i % 4))
        rows.append(ScoreRow(1 + i % 3, tokens, 3, logprobs=True, values=True, logits=not i % 4))
        rows.append(ScoreRow(BASE, tokens, 3, logprobs=True))
    return rows


def assert_same(found: RowResult, expected: RowResult) -> None:
    for name, numbers in vars(expected).items():
        if numbers is None:
            assert getattr(found, name) is None, name
        else:
            np.testing.assert_array_equal(getattr(found, name), numbers, name)


@pytest.mark.usefixtures("rewards")
def test_labels_and_logits_are_those_of_the_row_alone(run: Run) -> None:
    rows = mixed(texts(8))
    for row, found in zip(rows, run(ScoreJob(rows=rows)).rows, strict=True):
        assert_same(found, run(ScoreJob(rows=[row])).rows[0])


@pytest.mark.usefixtures("rewards")
@pytest.mark.parametrize("uid", list(REWARDS))
def test_a_score_is_the_token_score_at_its_place_whatever_comes_behind(run: Run, uid: int) -> None:
    tokens = texts(1, seed=3, shortest=20)[0]
    every = run(ScoreJob(rows=[ScoreRow(uid, tokens, token_scores=True)])).rows[0]
    assert every.scores is None
    assert every.token_scores.shape == (len(tokens), REWARDS[uid])
    for place in (-1, 0, 5, len(tokens) - 1, -3):
        both = run(ScoreJob(rows=[ScoreRow(uid, tokens, score=True, token_scores=True, score_at=place)])).rows[0]
        alone = run(ScoreJob(rows=[ScoreRow(uid, tokens, score=True, score_at=place)])).rows[0]
        np.testing.assert_array_equal(both.scores, every.token_scores[place])
        np.testing.assert_array_equal(alone.scores, every.token_scores[place])
        assert alone.token_scores is None


def test_logprobs_are_those_of_the_logits(run: Run) -> None:
    tokens = texts(1, seed=5, shortest=25)[0]
    for uid in (1, BASE):
        found = run(ScoreJob(rows=[ScoreRow(uid, tokens, 4, logprobs=True, logits=True)])).rows[0]
        logits = torch.from_numpy(found.logits)
        assert logits.shape == (len(tokens) - 4, 120)
        chosen = logits.gather(1, torch.from_numpy(tokens[4:, None]))[:, 0] - torch.logsumexp(logits, dim=-1)
        np.testing.assert_array_equal(found.logprobs, chosen.numpy())


def test_a_copy_shares_no_memory_with_what_it_is_a_copy_of(engine: Engine, run: Run) -> None:
    job = CreateAdapterJob(
        uid=21, name="critic", lora=LoraSpec(), value_head=True, kind=AdapterKind.CRITIC, init_from=2
    )
    assert run(job).kind is AdapterKind.CRITIC
    source, copy = (engine.adapters[uid].weights.parameters() for uid in (2, 21))
    assert sorted(source) == sorted(copy)
    for name, tensor in source.items():
        assert torch.equal(tensor, copy[name])
        assert tensor.data_ptr() != copy[name].data_ptr()
        assert copy[name].requires_grad
