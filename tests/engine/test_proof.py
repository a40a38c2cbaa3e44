"""Architectures are shown to be right when they are loaded, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from engine.conftest import BASE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, attention, open_engine, proof
from onebase.server.errors import FailedPrecondition, NotFound

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OLD = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}


def saved(config: PreTrainedConfig, path: Path) -> EngineConfig:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, path / name)
    return EngineConfig(model=str(path), threads=1, kv_slots=4, max_context=64)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=16),
        MistralConfig(**SMALL, sliding_window=8),
        GPT2Config(**OLD),
    ],
    ids=["llama", "llama-tied", "qwen2", "qwen3", "mistral-window", "gpt2"],
)
def test_proven(config: PreTrainedConfig, tmp_path: Path) -> None:
    assert isinstance(open_engine(saved(config, tmp_path)), Engine)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(**SMALL, head_dim=8), "softcap"),
        (GPTJConfig(**OLD), "attention"),
        (MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2), ""),
    ],
    ids=["gemma2", "gptj", "mamba"],
)
def test_refused_by_name(config: PreTrainedConfig, why: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=f"(?s){config.architectures or ''}.*{why}"):
        open_engine(saved(config, tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=100, d_model=32, num_layers=1).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    with pytest.raises(FailedPrecondition, match="not decoder-only"):
        open_engine(EngineConfig(model=str(tmp_path)))


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        open_engine(EngineConfig(model=str(tmp_path / "nowhere")))


def test_the_proof_notices_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._fresh
    monkeypatch.setattr(attention, "_fresh", lambda *given: right(*given[:4], given[4] * 1.05, *given[5:]))
    with pytest.raises(FailedPrecondition, match="logits differ"):
        open_engine(EngineConfig(model=str(BASE), threads=1))


def test_the_proof_notices_a_cache_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_decode", lambda cache, layer, decode, q, *_: q[:, decode.index])
    with pytest.raises(FailedPrecondition, match="cached logits differ"):
        open_engine(EngineConfig(model=str(BASE), threads=1))


def test_the_difference_is_rounding(engine: Engine) -> None:
    found = proof.prove(engine, engine._model)
    assert found.difference < 1e-5
    assert found.exact
