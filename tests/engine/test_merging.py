"""A merged model is the base plus the adapter, to transformers alone: PEFT's merge is the oracle."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
from oracle.fixtures import FIXTURES, PEFT_WARNINGS, assert_close, expected_scores
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedConfig

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, open_engine
from onebase.server.errors import AlreadyExists, FailedPrecondition, ResourceExhausted
from onebase.server.jobs import AdapterKind, CreateAdapterJob, LoadAdapterJob, LoraSpec

pytestmark = PEFT_WARNINGS

SIZES = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.25}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BASES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, **LLAMA, num_key_value_heads=2, max_position_embeddings=64),
    "Llama in bfloat16": LlamaConfig(**SIZES, **LLAMA, max_position_embeddings=64, dtype="bfloat16"),
    "Llama with tied embeddings": LlamaConfig(**SIZES, **LLAMA, max_position_embeddings=64, tie_word_embeddings=True),
    "GPT-2, Conv1D and tied": GPT2Config(**SIZES, **GPT2),
    "GPT-2, not tied": GPT2Config(**SIZES, **GPT2, tie_word_embeddings=False),
}
LORA = {"r": 3, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"}
PATTERNS = {"llama": {"v_proj": 5}, "gpt2": {"c_fc": 2}}


def make(config: PreTrainedConfig, folder: Path) -> None:
    """A random base, and a policy of it as PEFT saves one."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(config.dtype or torch.float32)
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(FIXTURES / "base").save_pretrained(folder / "base")
    kind = config.model_type
    lora = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", rank_pattern=PATTERNS[kind], **LORA)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "policy")


def opened(base: Path, policy: Path, kind: AdapterKind = AdapterKind.POLICY, **settings: str) -> Engine:
    """An engine of the base with the adapter of uid 1."""
    engine = open_engine(EngineConfig(model=str(base), threads=1, **settings))  # type: ignore[arg-type]
    job = LoadAdapterJob(uid=1, name="p", kind=kind, path=policy, value_head=kind is AdapterKind.POLICY)
    engine.add(engine.formats.load(job, max_rank=64))
    return engine


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([expected_scores("base")["sequences"][-1]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits[0]
    return found


@pytest.mark.parametrize("name", BASES)
def test_a_merged_model_gives_the_logits_of_base_and_adapter(tmp_path: Path, name: str) -> None:
    make(BASES[name], tmp_path)
    engine = opened(tmp_path / "base", tmp_path / "policy")
    before = {key: tensor.clone() for key, tensor in engine._model.state_dict().items()}

    result = engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "policy")
    unmerged = logits(adapted)
    oracle = adapted.merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(oracle)
    assert merged.dtype == oracle.dtype == (torch.bfloat16 if "bfloat16" in name else torch.float32)
    assert_close(logits(merged).float(), logits(oracle).float(), "merged logits")
    if merged.dtype == torch.float32:
        assert_close(logits(merged), unmerged, "logits of base and adapter")
    assert float((logits(merged) - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max()) > 0.1
    assert merged.config.tie_word_embeddings == oracle.config.tie_word_embeddings
    assert all(torch.equal(tensor, before[key]) for key, tensor in engine._model.state_dict().items())
    assert result.version == 0
    assert result.bytes == sum(file.stat().st_size for file in (tmp_path / "merged").rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["Llama", "Llama with tied embeddings", "GPT-2, Conv1D and tied"])
def test_its_files_are_those_of_a_plain_model(tmp_path: Path, name: str) -> None:
    make(BASES[name], tmp_path)
    engine = opened(tmp_path / "base", tmp_path / "policy")
    engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    plain, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    shapes = [{key: (t.shape, t.dtype) for key, t in tensors.items()} for tensors in (plain, merged)]
    assert shapes[0] == shapes[1]
    assert not any("v_head" in key or "lora" in key for key in merged)
    there = {file.name for file in (tmp_path / "merged").iterdir()}
    assert there >= {file.name for file in (tmp_path / "base").iterdir()}
    assert not there & {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("w5 w6")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "base")("w5 w6")["input_ids"]
    manifest = json.loads((tmp_path / "merged" / "onebase.json").read_text())
    assert (manifest["merged"], manifest["version"]) == ("p", 0)
    assert manifest["base"]["fingerprint"] == engine.facts.fingerprint
    assert set(manifest["sha256"]) == there - {"onebase.json"}


def test_a_merged_model_can_be_served_again(tmp_path: Path) -> None:
    make(BASES["Llama"], tmp_path)
    engine = opened(tmp_path / "base", tmp_path / "policy")
    engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    again = open_engine(EngineConfig(model=str(tmp_path / "merged"), threads=1))
    assert again.facts.fingerprint != engine.facts.fingerprint


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(BASES["Llama"], tmp_path)
    engine = opened(tmp_path / "base", tmp_path / "policy")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(engine.merger._tokenizer, "save_pretrained", full)
        with pytest.raises(ResourceExhausted, match="disk is full"):
            engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "policy"}
    engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    with pytest.raises(AlreadyExists):
        engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=True)
    with pytest.raises(AlreadyExists, match="is not an adapter"):
        engine.merger.save(engine.adapters[1], tmp_path / "base", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "policy", "merged"}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_is_refused_by_its_name(tmp_path: Path, quantization: str) -> None:
    engine = open_engine(EngineConfig(model=str(FIXTURES / "base"), threads=1, quantization=quantization))
    engine.add(engine.formats.create(CreateAdapterJob(uid=1, name="p", lora=LoraSpec(), value_head=False)))
    with pytest.raises(FailedPrecondition, match=quantization) as refused:
        engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    assert (refused.value.reason, refused.value.field) == ("QUANTIZED_BASE", "merged")
    assert "--quantization" in refused.value.message
    assert not list(tmp_path.iterdir())


def test_a_reward_is_refused_and_a_reference_is_not(tmp_path: Path) -> None:
    engine = opened(FIXTURES / "base", FIXTURES / "reward", AdapterKind.REWARD)
    with pytest.raises(FailedPrecondition, match="reward adapter, whose head") as refused:
        engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
    assert refused.value.reason == "WRONG_ADAPTER_KIND"
    engine = opened(FIXTURES / "base", FIXTURES / "policy", AdapterKind.REFERENCE)
    engine.merger.save(engine.adapters[1], tmp_path / "merged", overwrite=False)
