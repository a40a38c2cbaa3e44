"""PEFT's LoraConfig in the server's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebase.client import types as t

PEFT_DEFAULT = "peft-default"
"""The layers that PEFT adapts of an architecture where nobody names any."""

_REFUSED: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
}
"""What the server does not train, and the values that mean that nobody asks for it."""


def lora_spec(config: Any) -> t.LoraSpec:
    """The shape of a LoraConfig, or of a mapping with its keys.

    Dropout is left out: TRL's PPO never applied it.

    Raises:
        ValueError: it asks for something that the server does not train; the message names it.
    """

    def said(name: str, default: Any = None) -> Any:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        return default if value is None else value

    for name, fine in _REFUSED.items():
        if said(name) not in fine:
            raise ValueError(f"peft_config.{name}={said(name)!r} is not supported; leave it out")
    kind = getattr(said("peft_type", "LORA"), "value", said("peft_type", "LORA"))
    if kind != "LORA":
        raise ValueError(f"peft_config is of the kind {kind}; the server trains LORA")
    targets = said("target_modules", PEFT_DEFAULT)
    rank = int(said("r", 8))
    return t.LoraSpec(
        rank=rank,
        alpha=float(said("lora_alpha", 8)),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=bool(said("use_rslora", False)),
        rank_pattern=dict(said("rank_pattern", {})),
        alpha_pattern={name: float(alpha) for name, alpha in said("alpha_pattern", {}).items()},
    )
