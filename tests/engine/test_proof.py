"""Architectures are shown to be right when they are loaded, or refused by name; tests/matrix has them all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.conftest import BASE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
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
FAR = {"sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"]}


def saved(config: PreTrainedConfig, path: Path) -> EngineConfig:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, path / name)
    return EngineConfig(model=str(path), threads=1, kv_slots=4, max_context=64)


@pytest.mark.parametrize("architecture", [Qwen2MoeConfig, PhimoeConfig], ids=["qwen2-moe", "phimoe"])
def test_a_mask_that_differs_only_beyond_the_proofs_sequences_is_refused(architecture: Any, tmp_path: Path) -> None:
    # Neither tells its attention of the window that it masks.
    config = architecture(**SMALL, **FAR, use_sliding_window=True, num_experts_per_tok=2)
    with pytest.raises(FailedPrecondition, match=r"[Mm]oeForCausalLM is refused, .*token 63 sees token"):
        open_engine(saved(config, tmp_path))


def test_a_window_beyond_the_proofs_sequences_is_served(tmp_path: Path) -> None:
    assert isinstance(open_engine(saved(MistralConfig(**SMALL, sliding_window=50), tmp_path)), Engine)


def test_capped_scores_round_alike_with_and_without_a_cache(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, head_dim=8, sliding_window=8, attn_logit_softcapping=0.5)
    assert open_engine(saved(config, tmp_path)).facts.exact


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
