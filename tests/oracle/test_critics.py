"""Critics against PEFT's models with a linear head; copies of adapters against what they are copies of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle.fixtures import (
    FIXTURES,
    PEFT_WARNINGS,
    POLICIES,
    REWARDS,
    assert_close,
    assert_rows_close,
    expected_scores,
    of_completions,
    saved_weights,
    sequences,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from onebase.client import Client, Session
from onebase.client.errors import FailedPreconditionError
from onebase.client.types import AdamW, TrainingSequence, ValueLoss

pytestmark = PEFT_WARNINGS

Connect = Callable[[str], Client]

EVERY_POLICY = pytest.mark.parametrize(
    ("base", "adapter"), [(b, name) for b, names in POLICIES.items() for name in names]
)
EVERY_REWARD = pytest.mark.parametrize(
    ("base", "adapter"), [(b, name) for b, names in REWARDS.items() for name in names]
)


@contextmanager
def forgotten(client: Client, *names: str) -> Iterator[None]:
    """Deletes what a test has made, when its sessions are closed."""
    try:
        yield
    finally:
        there = {adapter.name for adapter in client.adapters()}
        for name in there & set(names):
            client.delete_adapter(name)


def values(session: Session, base: str, critic: str) -> list[Any]:
    return [score.values for score in session.score(sequences(base), outputs=["values"], critic=critic)]


def peft_values(base: str, path: str | Path) -> list[list[float]]:
    """A saved critic read by plain PEFT and torch: a linear head on the last hidden state before each token."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FIXTURES / base), path).eval()
    head = saved_weights(path)
    weight, bias = (torch.from_numpy(head[f"v_head.summary.{part}"].copy()) for part in ("weight", "bias"))
    rows = []
    for ids in expected_scores(base)["sequences"]:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            rows.append((states @ weight.T + bias)[:, 0].tolist())
    return of_completions(base, rows)


def train(session: Session, base: str, critic: str) -> None:
    """Two updates that are large enough to see, of the value head and the LoRA."""
    rows = []
    for sequence in sequences(base):
        numbers = np.linspace(-1, 1, len(sequence.completion), dtype=np.float32)
        rows.append(
            TrainingSequence(sequence.prompt, sequence.completion, old_values=np.zeros_like(numbers), returns=numbers)
        )
    for _ in range(2):
        session.forward_backward(rows, ValueLoss(cliprange_value=10.0), adapter=critic)
        session.optim_step(AdamW(learning_rate=1e-2), adapter=critic)


@EVERY_POLICY
def test_a_loaded_critics_values_are_trls(client_of: Connect, base: str, adapter: str) -> None:
    client = client_of(base)
    expected = of_completions(base, expected_scores(base)["policies"][adapter]["values"])
    other = next((name for name in POLICIES[base] if name != adapter), adapter)
    with forgotten(client, "critic"), client.open_session(other) as session:
        made = session.load_adapter("critic", adapter, kind="critic")
        assert (made.kind, made.value_head, made.leased) == ("critic", True, True)
        assert_rows_close(values(session, base, "critic"), expected, "values")
        (score, *_) = session.score(sequences(base), outputs=["values", "logprobs"], critic="critic")
        assert score.critic is not None
        assert (score.critic.name, score.policy.name) == ("critic", other)
        wanted = of_completions(base, expected_scores(base)["policies"][other]["logprobs"])[0]
        assert_close(score.logprobs, wanted, "the policy's own logprobs")


@EVERY_REWARD
@pytest.mark.parametrize("how", ["init_from", "load"])
def test_a_critic_begins_with_the_scores_of_a_reward_as_values(
    client_of: Connect, base: str, adapter: str, how: str
) -> None:
    client = client_of(base)
    rewards = client.reward(sequences(base), adapter, per_token=True)
    with forgotten(client, "critic"), client.open_session(POLICIES[base][0]) as session:
        if how == "init_from":
            session.create_adapter("critic", kind="critic", init_from=adapter)
        else:
            session.load_adapter("critic", adapter, kind="critic")
        found = values(session, base, "critic")
        facts, source = client.adapter("critic"), client.adapter(adapter)
    for sequence, value, reward in zip(sequences(base), found, rewards, strict=True):
        assert reward.token_scores is not None
        start = len(sequence.prompt)
        # The same weights on the same tokens, so the same bits; a bias of 0 changes none.
        np.testing.assert_array_equal(value, reward.token_scores[adapter][start - 1 : -1])
    assert facts.lora == source.lora
    assert (facts.num_labels, facts.value_head) == (0, True)


@EVERY_REWARD
def test_a_trained_critic_is_pefts_after_saving_and_leaves_its_reward_alone(
    client_of: Connect, place: Path, base: str, adapter: str
) -> None:
    client = client_of(base)
    before = [reward.score for reward in client.reward(sequences(base), adapter)]
    copy = f"copy-of-{adapter}"  # a name that nothing else has had, so that versions begin where they were saved
    with forgotten(client, "critic", copy), client.open_session(POLICIES[base][0]) as session:
        session.create_adapter("critic", kind="critic", init_from=adapter)
        first = np.concatenate(values(session, base, "critic"))
        train(session, base, "critic")
        found = values(session, base, "critic")
        saved = session.save_adapter(str(place / "saved"), name="critic", with_optimizer=True)
        again = session.load_adapter(copy, saved.path, kind="critic", with_optimizer=True)
        for new, old in zip(values(session, base, copy), found, strict=True):
            np.testing.assert_array_equal(new, old)
    assert (again.version, again.optimizer_bytes > 0) == (saved.adapter.version, True)
    assert np.abs(np.concatenate(found) - first).max() > 1e-2
    assert_rows_close(found, peft_values(base, saved.path), "values")
    assert [reward.score for reward in client.reward(sequences(base), adapter)] == before


def test_a_fresh_critic_is_the_base_with_a_random_head(client: Client, place: Path) -> None:
    with forgotten(client, "critic"), client.open_session("policy") as session:
        session.create_adapter("critic", kind="critic", value_head=False, seed=3)
        found = values(session, "base", "critic")
        saved = session.save_adapter(str(place / "saved"), name="critic")
    assert np.abs(np.concatenate(found)).max() > 1e-3
    assert_rows_close(found, peft_values("base", saved.path), "values")


def test_a_directory_without_a_head_is_a_critic_only_with_a_fresh_one(client: Client, place: Path) -> None:
    with forgotten(client, "bare", "critic"):
        client.create_adapter("bare", value_head=False)
        saved = client.save_adapter("bare", str(place / "bare"))
        with pytest.raises(FailedPreconditionError, match="set value_head for a fresh one") as refused:
            client.load_adapter("critic", saved.path, kind="critic")
        assert (refused.value.reason, refused.value.field) == ("MISSING_VALUE_HEAD", "value_head")
        assert client.load_adapter("critic", saved.path, kind="critic", value_head=True).value_head


# ----------------------------------------------------------------------------------------------------- policies


def test_a_policy_begins_as_a_copy_of_a_frozen_reference(client: Client) -> None:
    with forgotten(client, "sft", "copy", "headless"):
        client.load_adapter("sft", "policy_all", kind="reference")
        expected = client.reference_logprob(sequences("base"), reference="sft")
        made = client.create_adapter("copy", init_from="sft", seed=1)
        assert (made.kind, made.value_head, made.lora) == ("policy", True, client.adapter("sft").lora)
        assert not client.create_adapter("headless", init_from="sft", value_head=False).value_head
        for name in ("copy", "headless"):
            for found, wanted in zip(client.logprob(sequences("base"), adapter=name), expected, strict=True):
                np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
        with client.open_session("copy") as session:
            train(session, "base", "copy")
            changed = session.logprob(sequences("base"))
        after = client.reference_logprob(sequences("base"), reference="sft")
        assert any(not np.array_equal(a.logprobs, b.logprobs) for a, b in zip(changed, expected, strict=True))
        for found, wanted in zip(after, expected, strict=True):
            np.testing.assert_array_equal(found.logprobs, wanted.logprobs)


@EVERY_POLICY
def test_a_copy_of_a_policy_has_its_value_head(client_of: Connect, place: Path, base: str, adapter: str) -> None:
    client = client_of(base)
    with forgotten(client, "copy"):
        client.create_adapter("copy", init_from=adapter)
        saved = [saved_weights(client.save_adapter(name, str(place / name)).path) for name in (adapter, "copy")]
    assert sorted(saved[0]) == sorted(saved[1])
    assert all(np.array_equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


def test_a_policy_begun_from_a_reward_keeps_no_score_head(client: Client, place: Path) -> None:
    with forgotten(client, "copy"):
        made = client.create_adapter("copy", init_from="reward")
        saved = client.save_adapter("copy", str(place / "saved"))
    assert (made.num_labels, made.value_head) == (0, True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FIXTURES / "base"), saved.path)
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert not any("score" in name for name in saved_weights(saved.path))
