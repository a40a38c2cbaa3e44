"""Tiny random bases and adapters, saved by transformers and PEFT themselves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 120
HIDDEN = 32
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, len(SPECIAL_TOKENS)

# The initial spread of transformers (0.02) makes logits so flat that a wrong mask or scale would hardly show.
INITIALIZER_RANGE = 0.25


def make_bases() -> None:
    """Writes `base` (Llama, grouped queries, its own lm_head) and `base_gpt2` (Conv1D, tied lm_head, dropout)."""
    torch.manual_seed(1)
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCABULARY}
    llama = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        **ids,
    )
    gpt2 = GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, initializer_range=INITIALIZER_RANGE, **ids)
    for path, model in (("base", LlamaForCausalLM(llama)), ("base_gpt2", GPT2LMHeadModel(gpt2))):
        model.save_pretrained(path)
        _tokenizer(begins_with_bos=path == "base").save_pretrained(path)


def _tokenizer(begins_with_bos: bool) -> PreTrainedTokenizerFast:
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(FIRST_WORD, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_adapters() -> None:
    """Writes every adapter that the tests load: rewards with their score heads, policies with TRL's value heads."""
    attention = ["q_proj", "v_proj"]
    _reward("base", "reward", seed=11, r=8, lora_alpha=16, target_modules=attention)
    _reward(
        "base",
        "reward_2",
        seed=12,
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"q_proj": 6, "model.layers.1.mlp.up_proj": 3},
        alpha_pattern={"down_proj": 12, "model.layers.0.self_attn.k_proj": 2},
    )
    _policy("base", "policy", seed=21, r=8, lora_alpha=16, target_modules=attention)
    _policy(
        "base",
        "policy_all",
        seed=22,
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={"gate_proj": 2},
        alpha_pattern={"o_proj": 20},
    )
    convolutions = ["c_attn", "c_proj"]  # c_proj means the attention's and the MLP's; both are Conv1D, [in, out]
    _reward("base_gpt2", "reward_gpt2", seed=31, r=4, lora_alpha=8, target_modules=convolutions, fan_in_fan_out=True)
    _policy("base_gpt2", "policy_gpt2", seed=32, r=4, lora_alpha=8, target_modules=convolutions, fan_in_fan_out=True)


def _reward(base: str, path: str, seed: int, **lora: object) -> None:
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **lora))
    _fill(adapted, ("lora_B", "modules_to_save"))
    _save(adapted, path)


def _policy(base: str, path: str, seed: int, **lora: object) -> None:
    torch.manual_seed(seed)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **lora))
    _fill(adapted, ("lora_B",))
    _save(adapted, path)
    head = torch.nn.Linear(HIDDEN, 1)  # as TRL's ValueHead begins
    weights = {"v_head.summary.weight": head.weight.detach(), "v_head.summary.bias": head.bias.detach()}
    save_file(weights, Path(path) / "value_head.safetensors")


def _fill(model: torch.nn.Module, parts: tuple[str, ...]) -> None:
    # B begins at zero, which would make every adapter the base and hide errors in scale, order and names.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.normal_(0, 0.1)


def _save(model: torch.nn.Module, path: str) -> None:
    model.eval().save_pretrained(path)
    (Path(path) / "README.md").unlink()
    # PEFT writes sets as lists in the order of their hashes, which differs from run to run.
    config_path = Path(path) / "adapter_config.json"
    config = json.loads(config_path.read_text())
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
