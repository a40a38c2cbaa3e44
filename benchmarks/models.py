"""Random Llama-shaped models of the measured sizes, made once and kept under .cache/bench/, and their adapters.

Weights are random: what a step costs does not depend on what they are. The tokenizer's words are "w4", "w5", ….
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, open_engine
from onebase.server.engine.adapters import Weights
from onebase.server.jobs import AdapterKind, CreateAdapterJob, LoadAdapterJob, LoraSpec

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "bench"
VOCABULARY = 8192
FIRST_WORD = 4
"""Ids below are special tokens."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int


SHAPES = {
    "tiny": Shape(32, 2, 4, 2, 48),
    "39m": Shape(512, 8, 8, 8, 1792),
    "39.9m": Shape(512, 8, 8, 4, 2048),
    "171m": Shape(1024, 12, 16, 16, 2816),
    "1.1b": Shape(2048, 22, 32, 4, 5632),
    "7b": Shape(4096, 32, 32, 8, 14336),
}


def model_dir(name: str, dtype: str) -> Path:
    """The directory of a base with its tokenizer; made if it is not there."""
    return _made(CACHE / f"{name}-{dtype}", lambda path: _save_model(SHAPES[name], dtype, path))


def reward_dir(name: str, dtype: str, rank: int = RANK, targets: tuple[str, ...] = LINEARS) -> Path:
    """The directory of a reward adapter (PEFT, SEQ_CLS) of that base; made if it is not there."""
    base = model_dir(name, dtype)
    path = CACHE / f"{name}-{dtype}-reward-r{rank}-{len(targets)}"
    return _made(path, lambda folder: _save_reward(base, rank, targets, folder))


def prompts_file(count: int, length: int) -> Path:
    """A .jsonl file of prompts, each a list of token ids in the column "prompt"."""

    def save(folder: Path) -> None:
        ids = random_ids(count, length, seed=1).tolist()
        lines = "".join(json.dumps({"prompt": row}) + "\n" for row in ids)
        (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")

    return _made(CACHE / f"prompts-{count}-{length}", save) / "prompts.jsonl"


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] without special ones."""
    return torch.randint(FIRST_WORD, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def open_base(name: str, dtype: str) -> LlamaForCausalLM:
    """The plain base: transformers' own code with its sdpa attention."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        model_dir(name, dtype), attn_implementation="sdpa", dtype=getattr(torch, dtype)
    )
    return model.eval().requires_grad_(False)


def open_peft(name: str, dtype: str, adapters: int) -> PeftModel:
    """The base with PEFT's adapters "a1", "a2", … on all seven linears, as PEFT makes them by default."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(open_base(name, dtype), config, adapter_name="a1")
    for index in range(2, adapters + 1):
        model.add_adapter(f"a{index}", config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    return model.eval()


def open_ours(name: str, dtype: str, kv_slots: int = 64, exact: str = "auto") -> Engine:
    """Our engine on the base, without adapters."""
    model = str(model_dir(name, dtype))
    return open_engine(EngineConfig(model=model, device="cpu", threads=1, kv_slots=kv_slots, exact=exact))


def add_policy(engine: Engine, uid: int, rank: int = RANK) -> Weights:
    """A policy with a value head on all seven linears, its update not zero."""
    spec = LoraSpec(rank=rank, alpha=2.0 * rank, target_modules=LINEARS)
    engine.add(engine.formats.create(CreateAdapterJob(uid=uid, name=f"a{uid}", lora=spec, value_head=True, seed=uid)))
    weights = engine.adapter(uid).weights
    random = torch.Generator(engine.facts.device).manual_seed(uid)
    with torch.no_grad():
        for key, parameter in weights.parameters().items():
            if "lora_B" in key:
                parameter.normal_(0, 0.02, generator=random)
        for pair in weights.lora.values():
            pair.refresh()
    return weights


def add_reward(engine: Engine, uid: int, path: Path) -> Weights:
    """A reward adapter from its directory."""
    job = LoadAdapterJob(uid=uid, name=f"r{uid}", kind=AdapterKind.REWARD, path=path)
    engine.add(engine.formats.load(job, 512))
    return engine.adapter(uid).weights


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """The path, made whole or not at all."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(path)
    return path


def _save_model(shape: Shape, dtype: str, path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(FIRST_WORD, VOCABULARY))])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(path)


def _save_reward(base: Path, rank: int, targets: tuple[str, ...], path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="SEQ_CLS", target_modules=list(targets))
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.normal_(0, 0.02)
    model.eval().save_pretrained(path)
