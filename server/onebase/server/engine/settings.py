"""adapter_config.json: PEFT's settings in our words and ours in PEFT's.

What we do not compute the way PEFT does is refused by the name of its setting.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Set
from typing import Any

from peft import LoraConfig

from onebase.server import patterns
from onebase.server.engine.files import SavedFiles
from onebase.server.errors import FailedPrecondition, InvalidArgument, OnebaseError
from onebase.server.jobs import PEFT_DEFAULT, AdapterKind, LoraSpec

HEAD_NAMES = ("score", "classifier")

_UNDERSTOOD = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    ),
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout", "modules_to_save", "runtime_config"),
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_MAX_LAYER_LISTS = 16
"""Names in layers_pattern; PEFT makes a regular expression of each, for each of the model's modules."""
_MAX_TOLD = 256
"""Characters of a value in a message."""
_MAX_NUMBER = 2**31
_CONDENSED = 20
"""From so many names on, PEFT makes a list of modules shorter before it looks at layers_to_transform."""
_OF_EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""Ends of names that PEFT takes for experts' parameters where a model has no such module any more."""
_LAYERS = re.compile(r"[A-Za-z0-9_.]{1,256}", re.ASCII)
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights as they are."""


def lora_config(spec: LoraSpec, *, conv1d: bool, base: str) -> LoraConfig:
    """Our words in PEFT's."""
    targets: str | list[str] | None = list(spec.target_modules)
    if spec.target_modules == ("all-linear",):
        targets = "all-linear"
    elif spec.target_modules == (PEFT_DEFAULT,):
        targets = None
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=conv1d,
    )


def trainable_config(config: LoraConfig, base: str) -> LoraConfig:
    """The settings of a policy or critic that begins as a copy of another adapter: no score head belongs to it."""
    own = copy.copy(config)
    own.task_type, own.modules_to_save, own.base_model_name_or_path = "CAUSAL_LM", None, base
    return own


def read_config(files: SavedFiles) -> LoraConfig:
    """adapter_config.json as PEFT's LoraConfig.

    Raises:
        FailedPrecondition: it is not a LoRA, or has settings that this PEFT does not know.
    """
    raw = files.config()
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise FailedPrecondition(
            "NOT_LORA", f"peft_type is {told(kind)}: only LORA adapters can share a base here", field="path"
        )
    _check_sizes(raw)
    known = {name: value for name, value in raw.items() if name in LoraConfig.__dataclass_fields__}
    strange = sorted(name for name, value in raw.items() if name not in known and name not in _UNDERSTOOD and value)
    if strange:
        raise FailedPrecondition(
            "SETTING_NOT_SUPPORTED",
            f"adapter_config.json sets {told(strange[0])}, which is not known here",
            field="path",
        )
    known.pop("peft_type", None)
    try:
        config = LoraConfig(**known)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidArgument(
            "BAD_CONFIG", f"adapter_config.json of {files.path}: {str(error)[:_MAX_TOLD]}", field="path"
        ) from error
    _check_form(config)
    _check_patterns(config)
    return config


def told(value: object) -> str:
    """A client's value in a message: not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_TOLD else f"{text[:_MAX_TOLD]}…"


def _check_sizes(raw: dict[str, Any]) -> None:
    """Refuses lists and maps that would take PEFT long.

    Raises:
        InvalidArgument: naming the first.
    """
    for name, value in raw.items():
        most = _MAX_LAYER_LISTS if name == "layers_pattern" else patterns.MAX_NAMES
        if isinstance(value, list | dict) and len(value) > most:
            raise InvalidArgument(
                "BAD_CONFIG",
                f"adapter_config.json has {len(value)} entries in {told(name)}, and {most} are the most: use a "
                "regular expression, or names without the layer's number",
                field="path",
            )


def _check_form(config: LoraConfig) -> None:
    """Refuses settings of a type that PEFT only trips over later.

    Raises:
        InvalidArgument: naming the first.
    """
    ranks, alphas, saved = config.rank_pattern or {}, config.alpha_pattern or {}, config.modules_to_save or []
    layers = config.layers_to_transform
    fine = {
        **{name: _names(getattr(config, name)) for name in ("target_modules", "exclude_modules", "layers_pattern")},
        "layers_to_transform": layers is None
        or type(layers) is int
        or (isinstance(layers, list) and all(type(one) is int for one in layers)),
        "r": type(config.r) is int and abs(config.r) < _MAX_NUMBER,
        "lora_alpha": _number(config.lora_alpha),
        "rank_pattern": isinstance(ranks, dict)
        and all(type(rank) is int and 0 < rank < _MAX_NUMBER for rank in ranks.values()),
        "alpha_pattern": isinstance(alphas, dict) and all(map(_number, alphas.values())),
        "modules_to_save": isinstance(saved, list | tuple | set) and all(isinstance(name, str) for name in saved),
    }
    for name, as_it_should in fine.items():
        if not as_it_should:
            raise InvalidArgument(
                "BAD_CONFIG",
                f"adapter_config.json has {name}={told(getattr(config, name))}, which PEFT's LoraConfig does not take",
                field="path",
            )


def _number(value: object) -> bool:
    """Whether a setting is a number; an integer of JSON may be larger than any float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < _MAX_NUMBER if isinstance(value, int) else math.isfinite(value)


def _names(value: object) -> bool:
    """Whether a setting names modules as PEFT's do: not at all, by a text, or by a list."""
    if isinstance(value, list | tuple | set):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


def _check_patterns(config: LoraConfig) -> None:
    """Refuses regular expressions that could take ages to match: PEFT is given none of them (`Formats.targets`).

    Raises:
        InvalidArgument: BAD_PATTERN, naming the setting.
    """
    given: dict[str, Iterable[str]] = {
        "rank_pattern": config.rank_pattern or (),
        "alpha_pattern": config.alpha_pattern or (),
        "target_modules": [config.target_modules] if isinstance(config.target_modules, str) else (),
        "exclude_modules": [config.exclude_modules] if isinstance(config.exclude_modules, str) else (),
    }
    budget = patterns.checking()
    for setting, texts in given.items():
        for text in texts:
            try:
                patterns.check(text, budget)
            except patterns.PatternError as error:
                raise _bad_pattern(setting, text, error) from None
    layers = config.layers_pattern or ()
    for text in [layers] if isinstance(layers, str) else layers:
        if not _LAYERS.fullmatch(text):
            raise _bad_pattern("layers_pattern", text, "use the name of the list of layers, such as 'layers'")


def _bad_pattern(setting: str, text: str, why: object) -> InvalidArgument:
    """What is told of a pattern that is not matched here."""
    return InvalidArgument("BAD_PATTERN", f"adapter_config.json has {text[:256]!r} in {setting}: {why}", field="path")


def known_names(modules: Set[str], names: Iterable[str]) -> Set[str]:
    """A list of modules without those that name none, as PEFT reads lists: whole, or an end after a dot.

    What it means to PEFT does not change: it is told of names of old experts, a long list stays long, and some names
    are left for it to complain of where none is known.
    """
    parts = [name.split(".") for name in names]
    ends = {".".join(part[start:]) for part in parts for start in range(len(part))}
    found = modules & ends
    old = {f"\0.{end}" for end in _OF_EXPERTS & {name.rpartition(".")[2] for name in modules - ends}}
    if not found and not old:
        return set(sorted(modules)[:3])
    short = min(len(modules), _CONDENSED) - len(found | old)
    return found | old | {f"\0{number}" for number in range(short)}


def check_config(config: LoraConfig, kind: AdapterKind) -> None:
    """Refuses, by name, every setting that would change numbers in a way we do not compute.

    Raises:
        FailedPrecondition: with the setting's name and value.
    """

    def refuse(setting: str, value: object, way_out: str) -> OnebaseError:
        return FailedPrecondition(
            "SETTING_NOT_SUPPORTED", f"{setting}={told(value)} is not supported: {way_out}", field="path"
        )

    if config.use_dora:
        raise refuse(
            "use_dora",
            True,
            "DoRA divides by norms of the base's weights with the update merged in, so it has no product with the base "
            "that rows of other adapters could share; train a plain LoRA (use_dora=False)",
        )
    if config.bias != "none":
        raise refuse("bias", config.bias, "train with bias='none': biases belong to the shared base")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise refuse(
            "init_lora_weights", config.init_lora_weights, "it changes the base: save it converted to plain LoRA"
        )
    extra = sorted(set(config.modules_to_save or ()) - set(HEAD_NAMES))
    if extra:
        raise refuse("modules_to_save", extra, "only a score head may be saved with an adapter")
    default = LoraConfig()
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if name not in _UNDERSTOOD and value and value != getattr(default, name):
            raise refuse(name, value, "train the adapter without it")
    task = str(getattr(config.task_type, "value", config.task_type) or "")
    if kind is AdapterKind.CRITIC and task in ("CAUSAL_LM", "SEQ_CLS", ""):
        return
    if kind is AdapterKind.REWARD and task not in ("SEQ_CLS", ""):
        raise FailedPrecondition(
            "WRONG_TASK_TYPE",
            f"task_type is {told(task)}: a reward adapter needs SEQ_CLS, which keeps its score head",
            field="path",
        )
    if kind is not AdapterKind.REWARD and task not in ("CAUSAL_LM", ""):
        raise FailedPrecondition(
            "WRONG_TASK_TYPE",
            f"task_type is {told(task)}: a {kind.value} needs CAUSAL_LM; load this one as a reward",
            field="path",
        )
