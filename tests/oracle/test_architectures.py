"""Architectures over the wire: a served model answers as transformers does, with PEFT's adapters on it.

Every architecture is compared in tests/matrix, inside one process. Here a few go the whole way, or are refused before
the server serves. The oracle is the transformers and PEFT of this environment, on tiny random models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.fixtures import FIXTURES, PEFT_WARNINGS, assert_close, assert_rows_close, expected_scores
from peft import LoraConfig, get_peft_model
from support import start_server
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
)

from onebase.client import connect
from onebase.client.types import SamplingParams, Sequence

pytestmark = PEFT_WARNINGS

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8  # shorter than most of the sequences

CONFIGS: dict[str, PreTrainedConfig] = {
    "Mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "Gemma 2": Gemma2Config(
        **SIZES,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=3.0,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_completions_are_those_of_transformers_and_peft(tmp_path: Path, name: str) -> None:
    _make_base(CONFIGS[name], tmp_path / "base")
    policy = _adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "policy", "CAUSAL_LM")
    reward = _adapted(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1),
        tmp_path / "reward",
        "SEQ_CLS",
    )
    tokens = expected_scores("base")["sequences"]
    sequences = [Sequence(ids[:2], ids[2:]) for ids in tokens]
    flags = ["--policy", f"policy={tmp_path / 'policy'}", "--reward", f"reward={tmp_path / 'reward'}", "--threads", "1"]
    with start_server(tmp_path / "base", *flags) as server, connect(server.address) as client:
        logprobs = client.logprob(sequences, adapter="policy")
        rewards = client.reward(sequences, "reward")
        greedy = client.generate(
            [tokens[-1]], adapter="policy", sampling=SamplingParams(max_new_tokens=12, temperature=0)
        )
    assert_rows_close([result.logprobs for result in logprobs], [_logprobs(policy, ids) for ids in tokens], "logprobs")
    assert_close([one.score for one in rewards], [_score(reward, ids) for ids in tokens], "rewards")
    assert greedy[0].tokens.tolist() == _greedy(policy, tokens[-1])


def test_an_architecture_that_cannot_be_run_right_is_refused_by_name(tmp_path: Path) -> None:
    _make_base(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), tmp_path / "base")
    with (
        pytest.raises(RuntimeError, match=r"GptOssForCausalLM is refused, because .* s_aux"),
        start_server(tmp_path / "base"),
    ):
        pass


def test_positions_that_depend_on_the_longest_row_of_a_batch_are_refused(tmp_path: Path) -> None:
    # Beyond its original context longrope takes other frequencies for every row of the batch, so that a short row's
    # answer would depend on its neighbours. Sequences below that context, such as a proof's at load, cannot show it.
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
    rope |= {"factor": 2.0, "original_max_position_embeddings": 48}
    config = Phi3Config(**SIZES, original_max_position_embeddings=48, rope_parameters=rope)
    _make_base(config, tmp_path / "base")
    with pytest.raises(RuntimeError, match=r"Phi3ForCausalLM is refused, .*longrope"), start_server(tmp_path / "base"):
        pass


def _make_base(config: PreTrainedConfig, path: Path) -> None:
    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_config(config)
    _shake(base, ("bias", "norm"), 0.2)  # they begin as 0 and 1, where leaving them out would not show
    base.save_pretrained(path)
    AutoTokenizer.from_pretrained(FIXTURES / "base").save_pretrained(path)


def _shake(model: nn.Module, parts: tuple[str, ...], spread: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(torch.randn_like(parameter) * spread)


def _adapted(model: nn.Module, path: Path, task_type: str) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type=task_type))
    _shake(adapted, ("lora_B", "modules_to_save"), 0.1)
    adapted.eval().save_pretrained(path)
    return adapted


@torch.no_grad()
def _logprobs(model: nn.Module, ids: list[int]) -> torch.Tensor:
    distribution = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1].float(), dim=-1)
    return distribution.gather(1, torch.tensor(ids[1:])[:, None])[1:, 0]


@torch.no_grad()
def _score(model: nn.Module, ids: list[int]) -> float:
    return float(model(input_ids=torch.tensor([ids])).logits)


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
