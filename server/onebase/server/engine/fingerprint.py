"""Which base an adapter belongs to: one number for a base, in whatever precision it is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_SAMPLE = 64
"""Numbers of each weight that count."""


def fingerprint(model: PreTrainedModel, skeleton: PreTrainedModel, source: str) -> str:
    """SHA-256 over names, shapes and a sample of every weight, in bfloat16.

    Samples are read from the files that the model was loaded from, so neither dtype nor quantization counts. A weight
    that the files have under another name is taken as it was loaded; if it is quantized now, with its shape alone.

    Args:
        model: the base as it was loaded.
        skeleton: the same architecture, not quantized; its weights are not looked at.
        source: the hub id or directory that it was loaded from.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    loaded = dict(model.named_parameters())
    files = _files(source)
    for name, like in skeleton.named_parameters():
        digest.update(f"{name}{tuple(like.shape)}".encode())
        stored = name if name in files else name.removeprefix(f"{model.base_model_prefix}.")
        if stored in files:
            with safe_open(files[stored], framework="pt") as file:
                digest.update(_sample(file.get_tensor(stored)))
        elif name in loaded:
            digest.update(_sample(loaded[name].detach()))
    return digest.hexdigest()


def _sample(weight: torch.Tensor) -> bytes:
    flat = weight.reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].to(torch.bfloat16).view(torch.int16)
    return sample.cpu().numpy().tobytes()


def _files(source: str) -> dict[str, Path]:
    """The safetensors file of each weight by the weight's name there."""
    single = _file(source, SAFE_WEIGHTS_NAME)
    if single is not None:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = _file(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return {}
    names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = {shard: _file(source, shard) for shard in set(names.values())}
    return {name: path for name, shard in names.items() if (path := shards[shard]) is not None}


def _file(source: str, name: str) -> Path | None:
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
