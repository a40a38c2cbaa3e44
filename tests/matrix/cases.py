"""The architectures of the matrix, each as small as it can be with everything that makes it what it is.

A case is a configuration of transformers. Random weights are enough: what is compared is arithmetic. Spreads are wide
and windows short, so that a wrong mask, scale or cap shows in every number; `shows` names the settings whose loss
must show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig

CONTEXT = 64
"""Longest sequence of every model, in tokens."""

WINDOW = 8
"""Sliding windows; most sequences are longer."""

IDS = {"vocab_size": 120, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPREAD = {"initializer_range": 0.25}
CALM = {"initializer_range": 0.1}
"""For models that magnify float32's rounding under a wider spread, transformers' own included."""

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": CONTEXT}
MLP = {"intermediate_size": 48}
GROUPED = {"num_key_value_heads": 2}
HEAD = {"head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
PLAIN: dict[str, Any] = {**IDS, **SPREAD, **LAYERS, **MLP}
MODERN: dict[str, Any] = {**PLAIN, **GROUPED}
MIXED = ["sliding_attention", "full_attention"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROUTED = {"num_experts_per_tok": 2}


Targets = str | list[str]


@dataclass(frozen=True)
class Case:
    """An architecture with its settings."""

    config: Callable[..., PreTrainedConfig]
    settings: Mapping[str, Any]
    shows: Mapping[str, Any] = field(default_factory=dict)
    """Settings, and a value that takes their effect away."""
    targets: Targets = "all-linear"
    """What the adapters adapt."""

    def configure(self, *, tied: bool, **others: Any) -> PreTrainedConfig:
        """The configuration, its output embedding tied to its input's or not."""
        return self.config(**{**self.settings, "tie_word_embeddings": tied, **others})


CASES: dict[str, Case] = {
    "Llama": Case(hf.LlamaConfig, {**MODERN, **HEAD, "attention_bias": True, "mlp_bias": True}),
    "Llama with YaRN positions": Case(
        hf.LlamaConfig,
        {
            **MODERN,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "Mistral, sliding window": Case(
        hf.MistralConfig, {**MODERN, **HEAD, "sliding_window": WINDOW}, {"sliding_window": CONTEXT}
    ),
    "Ministral, sliding and full layers": Case(
        hf.MinistralConfig,
        {**MODERN, **HEAD, "sliding_window": WINDOW, "layer_types": MIXED},
        {"sliding_window": CONTEXT},
    ),
    "Ministral 3, queries scaled by place": Case(
        hf.Ministral3Config,
        {
            **MODERN,
            **HEAD,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "Mixtral, sliding window": Case(
        hf.MixtralConfig,
        {**MODERN, **HEAD, **ROUTED, "num_local_experts": 4, "sliding_window": WINDOW},
        {"sliding_window": CONTEXT},
        targets=ATTENTION,
    ),
    "Qwen2": Case(hf.Qwen2Config, MODERN),
    "Qwen2, sliding and full layers": Case(
        hf.Qwen2Config,
        {**MODERN, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"sliding_window": CONTEXT},
    ),
    "Qwen3": Case(hf.Qwen3Config, {**MODERN, "head_dim": 16}),
    "Qwen2-MoE": Case(
        hf.Qwen2MoeConfig,
        {
            **MODERN,
            **ROUTED,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "Qwen2-MoE, sliding window": Case(
        hf.Qwen2MoeConfig,
        {
            **MODERN,
            **ROUTED,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        {"sliding_window": CONTEXT},
    ),
    "Qwen3-MoE": Case(
        hf.Qwen3MoeConfig,
        {**MODERN, **HEAD, **ROUTED, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
        targets=ATTENTION,
    ),
    "Phi-3.5-MoE, sliding window": Case(
        hf.PhimoeConfig,
        {**MODERN, **ROUTED, "num_local_experts": 4, "sliding_window": WINDOW},
        {"sliding_window": CONTEXT},
        targets=ATTENTION,
    ),
    "Qwen3-Next": Case(
        hf.Qwen3NextConfig,
        {
            **MODERN,
            **HEAD,
            **ROUTED,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "Gemma": Case(hf.GemmaConfig, {**MODERN, **HEAD}),
    "Gemma 2": Case(
        hf.Gemma2Config,
        {
            **MODERN,
            **HEAD,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {"sliding_window": CONTEXT, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "VaultGemma": Case(
        hf.VaultGemmaConfig,
        {
            **MODERN,
            **HEAD,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {"sliding_window": CONTEXT, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "Gemma 3": Case(
        hf.Gemma3TextConfig,
        {
            **MODERN,
            **HEAD,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
        {"sliding_window": CONTEXT, "final_logit_softcapping": None},
    ),
    "Gemma 3 with images, asked for text": Case(
        hf.Gemma3Config,
        {
            "text_config": {
                **MODERN,
                **HEAD,
                "query_pre_attn_scalar": 8,
                "sliding_window": WINDOW,
                "layer_types": MIXED,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 117,
            "eoi_token_index": 118,
            "image_token_index": 119,
        },
        targets=r".*language_model.*_proj",  # not the layers that see images: texts give them no gradient
    ),
    "GPT-2": Case(hf.GPT2Config, {**IDS, **SPREAD, **OLD}),
    "GPT-2, scores scaled by layer": Case(
        hf.GPT2Config, {**IDS, **SPREAD, **OLD, "scale_attn_by_inverse_layer_idx": True}
    ),
    "GPT-BigCode": Case(hf.GPTBigCodeConfig, {**IDS, **SPREAD, **OLD}),
    "GPT-J": Case(hf.GPTJConfig, {**IDS, **SPREAD, **OLD, "rotary_dim": 4}),
    "GPT-NeoX": Case(hf.GPTNeoXConfig, PLAIN),
    "GPT-NeoX, one residual after another": Case(hf.GPTNeoXConfig, {**PLAIN, "use_parallel_residual": False}),
    "gpt-oss": Case(
        hf.GptOssConfig,
        {**MODERN, **HEAD, **ROUTED, "num_local_experts": 4, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "Phi": Case(hf.PhiConfig, PLAIN),
    "Phi-3, sliding window": Case(hf.Phi3Config, {**MODERN, "sliding_window": WINDOW}, {"sliding_window": CONTEXT}),
    "Phi-3, longrope positions": Case(
        hf.Phi3Config,
        {
            **MODERN,
            "original_max_position_embeddings": 48,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "factor": 2.0,
                "original_max_position_embeddings": 48,
            },
        },
    ),
    "OLMo": Case(hf.OlmoConfig, {**MODERN, "clip_qkv": 1.0}, {"clip_qkv": None}),
    "OLMo2": Case(hf.Olmo2Config, MODERN),
    "OLMo3, sliding and full layers": Case(
        hf.Olmo3Config, {**MODERN, "sliding_window": WINDOW, "layer_types": MIXED}, {"sliding_window": CONTEXT}
    ),
    "OLMoE": Case(hf.OlmoeConfig, {**MODERN, **ROUTED, "num_experts": 4}, targets=ATTENTION),
    "Granite": Case(
        hf.GraniteConfig,
        {
            **MODERN,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        {"logits_scaling": 1.0, "attention_multiplier": 1.0},
    ),
    "GraniteMoE": Case(
        hf.GraniteMoeConfig,
        {
            **MODERN,
            **ROUTED,
            "num_local_experts": 4,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "OPT": Case(hf.OPTConfig, {**IDS, **LAYERS, "ffn_dim": 48, "init_std": 0.25, "word_embed_proj_dim": 32}),
    "OPT, embeddings narrower than its layers": Case(
        hf.OPTConfig, {**IDS, **LAYERS, "ffn_dim": 48, "init_std": 0.25, "word_embed_proj_dim": 16}
    ),
    "Cohere": Case(hf.CohereConfig, {**MODERN, "logit_scale": 0.25, "use_qk_norm": True}, {"logit_scale": 1.0}),
    "Cohere2, sliding and full layers": Case(
        hf.Cohere2Config,
        {**MODERN, "logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": MIXED},
        {"sliding_window": CONTEXT, "logit_scale": 1.0},
    ),
    "StableLM": Case(
        hf.StableLmConfig,
        {
            **MODERN,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "SmolLM3": Case(hf.SmolLM3Config, {**MODERN, **CALM, "no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 1]}),
    "StarCoder2, sliding window": Case(
        hf.Starcoder2Config, {**MODERN, "sliding_window": WINDOW}, {"sliding_window": CONTEXT}
    ),
    "Arcee": Case(hf.ArceeConfig, MODERN),
    "EXAONE 4, sliding and full layers": Case(
        hf.Exaone4Config,
        {**MODERN, "sliding_window": WINDOW, "layer_types": MIXED},
        {"sliding_window": CONTEXT},
    ),
    "GLM-4": Case(hf.Glm4Config, {**MODERN, **HEAD}),
    "Helium": Case(hf.HeliumConfig, {**MODERN, **HEAD}),
    "Nemotron": Case(hf.NemotronConfig, {**MODERN, **CALM}),
    "Seed-OSS": Case(hf.SeedOssConfig, {**MODERN, **HEAD}),
    "BLOOM": Case(hf.BloomConfig, {**IDS, **SPREAD, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": Case(hf.FalconConfig, {**IDS, **SPREAD, **LAYERS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "MPT": Case(hf.MptConfig, {**IDS, **SPREAD, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "Llama 4": Case(
        hf.Llama4TextConfig,
        {
            **MODERN,
            **HEAD,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "floor_scale": WINDOW,
        },
    ),
    "DeepSeek-V3": Case(
        hf.DeepseekV3Config,
        {
            **PLAIN,
            **ROUTED,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "Mamba": Case(hf.MambaConfig, {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
