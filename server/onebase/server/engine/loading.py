"""From a hub id or a directory to an engine that was shown to be right for this very model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from pathlib import Path

import torch
from jinja2 import TemplateSyntaxError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from onebase.server.config import EngineConfig
from onebase.server.engine import attention, lora, quantized
from onebase.server.engine.batch import Route
from onebase.server.engine.engine import Engine
from onebase.server.engine.fingerprint import fingerprint
from onebase.server.engine.formats import Formats
from onebase.server.engine.heads import LmHead, logits_finish
from onebase.server.engine.kernels import KernelFailure, available, try_out
from onebase.server.engine.kv import KVCache
from onebase.server.engine.merging import Merger
from onebase.server.engine.precision import widens
from onebase.server.engine.proof import Proof, prove
from onebase.server.engine.segmented import SegmentedLora
from onebase.server.engine.text import Text, has_chat_template
from onebase.server.engine.tokenizer_check import TokenizerCheck
from onebase.server.errors import FailedPrecondition, InvalidArgument, NotFound
from onebase.server.jobs import BaseFacts

log = logging.getLogger(__name__)


def open_engine(config: EngineConfig) -> Engine:
    """Loads the base and its tokenizer, puts our layers in, and proves that the engine computes what the model does.

    Raises:
        NotFound: there is no such model.
        InvalidArgument: a setting does not fit the model or the machine.
        FailedPrecondition: the engine cannot run this architecture right; the message says why.
    """
    disable_progress_bar()
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 2) // 2))
    device = _device(config.device)
    settings, tokenizer = _describe(config)
    log.info("loading %s", config.model)
    model = _load(config, settings, device)
    model.eval().requires_grad_(False)
    skeleton = _skeleton(settings)
    facts = _facts(config, model, skeleton, tokenizer)
    _refuse_longrope(model.config, facts)
    exact = _wants_exact(config, device)
    wide = widens(model.dtype, device, exact=exact)
    route = Route(exact=exact, wide=wide)
    blocks = model.base_model
    if blocks is model:
        raise FailedPrecondition(
            "ARCHITECTURE_NOT_SUPPORTED", f"{facts.architecture} has no base_model that gives its last hidden states"
        )
    wrapped = lora.install(model, blocks, route)
    attention.install(model, route)
    dtype = torch.float32 if wide else model.dtype  # of products
    kernels = _uses_kernels(config, dtype, device, exact=route.exact)
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in wrapped.items()}
    conv1d = any(not isinstance(skeleton.get_submodule(name), nn.Linear) for name in wrapped)
    text = Text(tokenizer)
    engine = Engine(
        model,
        route,
        LmHead(model.get_output_embeddings(), logits_finish(model.config), wide),
        Formats(skeleton, set(wrapped), facts, TokenizerCheck(text.decoder), dtype, conv1d=conv1d),
        Merger(model, skeleton, wrapped, tokenizer, facts),
        text,
        facts,
        KVCache(config.kv_slots, facts.max_context),
        [layer.out_features for layer in wrapped.values()],
        SegmentedLora(shapes, device) if kernels else None,
    )
    engine.version_window = config.version_window
    if config.gradient_checkpointing:
        engine.recomputed = recomputed_layers(model)
    proof = prove(engine, model)
    engine.facts = dataclasses.replace(facts, exact=_is_exact(config, route, proof))
    engine.kv = KVCache(config.kv_slots, facts.max_context, config.kv_bytes, engine.kv.token_bytes)
    return engine


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidArgument(
            "NO_CUDA", f"device is {name!r}, and torch sees no CUDA device: use --device cpu", field="device"
        )
    return torch.device(name)


def _wants_exact(config: EngineConfig, device: torch.device) -> bool:
    return config.exact == "on" or (config.exact == "auto" and device.type == "cpu" and config.kernels != "on")


def _is_exact(config: EngineConfig, route: Route, proof: Proof) -> bool:
    """Whether the engine is exact, as far as the proof saw.

    Raises:
        FailedPrecondition: it must be, and is not.
    """
    if route.exact and not proof.exact:
        seen = f"{proof.cached_difference:.1e} between logits of the cache and of the whole sequence"
        if config.exact == "on":
            raise FailedPrecondition(
                "NOT_EXACT",
                f"exact is on, and this machine's products round by batch ({seen}): serve with --exact auto, and "
                "PPO scores its rollouts again",
                field="exact",
            )
        log.warning("not exact: this machine's products round by batch (%s); PPO scores its rollouts again", seen)
    return route.exact and proof.exact


def _uses_kernels(config: EngineConfig, dtype: torch.dtype, device: torch.device, *, exact: bool) -> bool:
    """Whether the kernels make the adapters' products; a trial shows that they can.

    Not where the engine is exact: training goes through torch, and an exact engine's training gives inference's
    numbers. And of its own accord on CUDA only: Triton's interpreter is for tests.

    Raises:
        FailedPrecondition: they must, and cannot.
    """
    if exact or config.kernels == "off" or (config.kernels == "auto" and device.type != "cuda"):
        return False
    why = f"Triton has no kernels for {device} here"
    if available(device):
        try:
            try_out(device, dtype)
        except KernelFailure as error:
            why = str(error)
        else:
            log.info("the adapters' products are made by Triton kernels, except in training")
            return True
    if config.kernels == "on":
        raise FailedPrecondition("NO_KERNELS", f"kernels is on, and {why}: serve with --kernels auto", field="kernels")
    log.warning("the adapters' products are torch's: %s", why)
    return False


def _describe(config: EngineConfig) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The model's configuration and tokenizer."""
    try:
        source = config.model
        settings = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        source = config.tokenizer or config.model
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFound(
            "MODEL_NOT_FOUND", f"cannot load {source!r} as a hub id or a directory: {first}", field="model"
        ) from error
    if config.chat_template is not None:
        _set_template(tokenizer, config.chat_template)
    if getattr(settings, "is_encoder_decoder", False):
        raise FailedPrecondition(
            "ARCHITECTURE_NOT_SUPPORTED", f"{config.model!r} ({settings.model_type}) is not decoder-only", field="model"
        )
    return settings, tokenizer


def _set_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Gives the tokenizer another chat template."""
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except (TemplateSyntaxError, OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            "BAD_CHAT_TEMPLATE", f"chat_template {str(path)!r} is no Jinja template: {error}", field="chat_template"
        ) from error
    except Exception as error:  # it may refuse just this conversation
        log.debug("the chat template refuses a lone user: %s", error)


def _load(config: EngineConfig, settings: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """The model on the device, its linear layers quantized if the settings say so."""
    quantization = quantized.loading_config(config.quantization)
    saved = getattr(settings, "quantization_config", None)
    if saved and (quantization is not None or saved.get("quant_method", "bitsandbytes") == "bitsandbytes"):
        raise FailedPrecondition(
            "QUANTIZED_ALREADY",
            f"{config.model!r} was saved with quantized weights: serve the model that they were made from, with "
            "--quantization int8 or nf4",
            field="model",
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.model,
            config=settings,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": device},
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise FailedPrecondition(
            "MODEL_NOT_LOADED",
            f"{config.model!r} ({settings.model_type}) is no causal LM that can be loaded: {first}",
            field="model",
        ) from error
    if quantization is None:
        return model.to(device)
    quantized.take_over(model)
    return model


def _skeleton(settings: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(settings))
    return skeleton


def _facts(
    config: EngineConfig, model: PreTrainedModel, skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> BaseFacts:
    settings = model.config.get_text_config()
    longest = int(getattr(settings, "max_position_embeddings", 0) or 0) or config.max_context
    if not longest:
        raise InvalidArgument(
            "NO_CONTEXT", "the model does not say how long its context is: give max_context", field="max_context"
        )
    if config.max_context > longest:
        raise InvalidArgument(
            "CONTEXT_TOO_LONG",
            f"max_context is {config.max_context}, and the model was made for {longest}",
            field="max_context",
        )
    return BaseFacts(
        model=config.model,
        architecture=type(model).__name__,
        fingerprint=fingerprint(model, skeleton, config.model),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        hidden_size=_width(skeleton),
        num_layers=int(settings.num_hidden_layers),
        max_context=config.max_context or longest,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        parameter_count=sum(p.numel() for p in skeleton.parameters()),
        weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        eos_token_ids=_eos_ids(model, tokenizer.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        quantization=config.quantization,
        chat_template=has_chat_template(tokenizer),
    )


def _width(skeleton: PreTrainedModel) -> int:
    """Of the last hidden states; an OPT may narrow them after its layers."""
    embedding = skeleton.get_output_embeddings()
    if embedding is None:
        return int(skeleton.config.get_text_config().hidden_size)
    return int(embedding.weight.shape[1])


def recomputed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that recompute their activations in the backward pass when they are told that they train.

    Only the blocks themselves are told so: their parts stay in evaluation mode, so no dropout comes with it.

    Raises:
        InvalidArgument: the architecture has no such blocks.
    """
    if not model.supports_gradient_checkpointing:
        raise InvalidArgument(
            "NO_GRADIENT_CHECKPOINTING", f"{type(model).__name__} has no gradient checkpointing: serve it without"
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _refuse_longrope(config: PreTrainedConfig, facts: BaseFacts) -> None:
    """Refuses positions that depend on the longest row of a batch: rows side by side would change each other."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return
    short = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    short = short or config.max_position_embeddings
    if facts.max_context > int(short):
        raise FailedPrecondition(
            "ARCHITECTURE_NOT_SUPPORTED",
            f"{facts.architecture} is refused, because its {rope['rope_type']} positions depend on the longest row of "
            f"a batch beyond {short} tokens: serve it with --max-context {short}",
            field="model",
        )


def _eos_ids(model: PreTrainedModel, tokenizer_eos: int | None) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's first, then what the generation config adds."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = model.config.eos_token_id
    more = given if isinstance(given, list) else [given]
    ids = [i for i in [tokenizer_eos, *more] if i is not None]
    return tuple(dict.fromkeys(ids))
