"""Adapters cross the border both ways: what PEFT trained loads here, what is saved here loads in plain PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
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
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from onebase.client import Client
from onebase.client.types import AdamW, AdapterKind, LoraSpec, PpoLoss, TrainingSequence

pytestmark = PEFT_WARNINGS

Connect = Callable[[str], Client]

QUERIES_AND_VALUES = ["q_proj", "v_proj"]
FULL_PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]

LLAMA_LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 32, "target_modules": QUERIES_AND_VALUES},
    "all-linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "full paths": {"r": 3, "target_modules": FULL_PATHS},
    "a regular expression": {"r": 3, "target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
    "rsLoRA": {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": QUERIES_AND_VALUES},
    "rank_pattern": {
        "r": 2,
        "rank_pattern": {"v_proj": 5, "^model.layers.0.*q_proj": 3},
        "target_modules": "all-linear",
    },
    "alpha_pattern": {
        "r": 2,
        "alpha_pattern": {"v_proj": 31, r".*\.1\..*down_proj": 1},
        "target_modules": "all-linear",
    },
    "patterns and rsLoRA": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"q_proj": 27, "k_proj": 2},
        "target_modules": ["q_proj", "k_proj"],
    },
    "layers_to_transform": {"r": 4, "target_modules": QUERIES_AND_VALUES, "layers_to_transform": [1]},
    "exclude_modules": {"r": 4, "target_modules": QUERIES_AND_VALUES, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "dropout, which scoring must not draw": {"r": 4, "target_modules": QUERIES_AND_VALUES, "lora_dropout": 0.5},
}

GPT2_LORAS: dict[str, dict[str, Any]] = {
    "Conv1D": {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "Conv1D, all-linear": {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": True},
}

EVERY_REWARD = pytest.mark.parametrize(
    ("base", "adapter"), [(b, name) for b, names in REWARDS.items() for name in names]
)
EVERY_POLICY = pytest.mark.parametrize(
    ("base", "adapter"), [(b, name) for b, names in POLICIES.items() for name in names]
)
EVERY_SPEC = pytest.mark.parametrize(
    ("base", "spec"),
    [
        ("base", LoraSpec()),
        ("base", LoraSpec(4, 6, ("q_proj", "up_proj"), True, {"up_proj": 9}, {"model.layers.0.self_attn.q_proj": 2.5})),
        ("base_gpt2", LoraSpec(3, 7)),
        ("base_gpt2", LoraSpec(3, 7, ("c_attn", "mlp.c_proj"))),
    ],
)
EVERY_LORA = pytest.mark.parametrize(
    ("base", "lora"),
    [
        pytest.param(base, lora, id=name)
        for base, loras in (("base", LLAMA_LORAS), ("base_gpt2", GPT2_LORAS))
        for name, lora in loras.items()
    ],
)


@EVERY_LORA
def test_a_policy_trained_by_peft_loads_here(client_of: Connect, place: Path, base: str, lora: dict[str, Any]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(FIXTURES / base)
    model = _trained(plain, LoraConfig(task_type="CAUSAL_LM", **lora))
    model.save_pretrained(str(place))
    with _loaded(client_of(base), place, "policy") as name:
        results = client_of(base).logprob(sequences(base), adapter=name)
    assert_rows_close([result.logprobs for result in results], _logprobs(model, base), "logprobs")


@EVERY_LORA
def test_a_reward_trained_by_peft_loads_here(client_of: Connect, place: Path, base: str, lora: dict[str, Any]) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(FIXTURES / base, num_labels=1)
    model = _trained(plain, LoraConfig(task_type="SEQ_CLS", **lora))
    model.save_pretrained(str(place))
    with _loaded(client_of(base), place, "reward") as name:
        rewards = client_of(base).reward(sequences(base), name)
    assert_close([reward.score for reward in rewards], _scores(model, base), "scores")


@EVERY_POLICY
def test_a_policy_trained_and_saved_here_loads_in_plain_peft(
    client_of: Connect, place: Path, base: str, adapter: str
) -> None:
    client = client_of(base)
    with _loaded(client, adapter, "policy") as name:
        _train_here(client, name, base)
        client.save_adapter(name, str(place / "saved"))
        results = client.logprob(sequences(base), adapter=name)
    found = [result.logprobs for result in results]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FIXTURES / base), place / "saved")
    assert_rows_close(found, _logprobs(model, base), "logprobs")
    before = of_completions(base, expected_scores(base)["policies"][adapter]["logprobs"])
    assert max(float(np.abs(a - np.array(b)).max()) for a, b in zip(found, before, strict=True)) > 1e-2


@EVERY_SPEC
def test_a_policy_made_and_trained_here_loads_in_plain_peft(
    client_of: Connect, place: Path, base: str, spec: LoraSpec
) -> None:
    client = client_of(base)
    client.create_adapter("made", spec, value_head=True, seed=3)
    try:
        _train_here(client, "made", base)
        client.save_adapter("made", str(place / "saved"))
        results = client.logprob(sequences(base), adapter="made")
    finally:
        client.delete_adapter("made")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FIXTURES / base), place / "saved")
    assert_rows_close([result.logprobs for result in results], _logprobs(model, base), "logprobs")


@EVERY_POLICY
def test_a_policy_saved_here_comes_back_bit_by_bit(client_of: Connect, place: Path, base: str, adapter: str) -> None:
    client = client_of(base)
    with _loaded(client, adapter, "policy") as name:
        _train_here(client, name, base)
        saved = client.save_adapter(name, str(place / "saved"))
        before = client.logprob(sequences(base), adapter=name, values=True)
    with _loaded(client, saved.path, "policy") as name:
        again = client.save_adapter(name, str(place / "again"))
        after = client.logprob(sequences(base), adapter=name, values=True)
    assert again.adapter.version == saved.adapter.version + 1  # a name's versions go on after a deletion
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.logprobs, new.logprobs)
        np.testing.assert_array_equal(old.values, new.values)
    first, second = saved_weights(saved.path), saved_weights(again.path)
    assert sorted(first) == sorted(second)
    assert all(np.array_equal(tensor, second[name]) for name, tensor in first.items())


@EVERY_REWARD
def test_a_reward_saved_again_keeps_its_head(client_of: Connect, place: Path, base: str, adapter: str) -> None:
    client_of(base).save_adapter(adapter, str(place / "saved"))
    plain = AutoModelForSequenceClassification.from_pretrained(FIXTURES / base, num_labels=1)
    model = PeftModel.from_pretrained(plain, place / "saved")
    assert_close(_scores(model, base), expected_scores(base)["rewards"][adapter]["alone"], "scores")


@contextmanager
def _loaded(client: Client, path: str | Path, kind: AdapterKind) -> Iterator[str]:
    client.load_adapter("loaded", str(path), kind=kind)
    try:
        yield "loaded"
    finally:
        client.delete_adapter("loaded")


def _train_here(client: Client, name: str, base: str) -> None:
    """Two updates that are large enough to see."""
    rows = []
    for sequence in sequences(base):
        numbers = np.linspace(-1, 1, len(sequence.completion), dtype=np.float32)
        rows.append(TrainingSequence(sequence.prompt, sequence.completion, numbers - 4, numbers, numbers, -numbers))
    with client.open_session(name) as session:
        for _ in range(2):
            session.forward_backward(rows, PpoLoss(ratio_threshold=1e9))
            session.optim_step(AdamW(learning_rate=1e-2))


def _trained(model: nn.Module, config: LoraConfig) -> PeftModel:
    """PEFT's model after two of torch's own updates; until then B is zero and hides every mistake."""
    torch.manual_seed(5)
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor([expected_scores("base")["sequences"][-1]])
    for _ in range(2):
        optimizer.zero_grad()
        logits = adapted(input_ids=ids).logits
        (logits.logsumexp(-1).mean() + logits[..., 0].mean()).backward()
        optimizer.step()
    return adapted.eval()


@torch.no_grad()
def _logprobs(model: nn.Module, base: str) -> list[NDArray[np.float32]]:
    rows = []
    for ids in expected_scores(base)["sequences"]:
        distribution = torch.log_softmax(model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1], dim=-1)
        rows.append(distribution.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
    return of_completions(base, rows)


@torch.no_grad()
def _scores(model: nn.Module, base: str) -> list[float]:
    return [float(model.eval()(input_ids=torch.tensor([ids])).logits) for ids in expected_scores(base)["sequences"]]
