"""The keyword arguments of transformers' `generate`, as sampling parameters of the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onebase.client import types as t

MAX_LENGTH, TOP_K = 20, 50
"""What transformers takes where nothing is said."""

_KNOWN = {
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "num_return_sequences", "eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "seed"),
    *("generation_config", "tokenizer", "use_cache", "synced_gpus", "attention_mask", "position_ids"),
}
_OFF: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "repetition_penalty": (1, 1.0, None),
    "no_repeat_ngram_size": (0, None),
    "penalty_alpha": (None,),
    "return_dict_in_generate": (False, None),
    "output_scores": (False, None),
    "typical_p": (1, 1.0, None),
    "epsilon_cutoff": (0, 0.0, None),
    "length_penalty": (1, 1.0, None),
}
"""What the server does not do, and the values that mean that nobody asks for it."""


@dataclass(frozen=True)
class Asked:
    """What a call of `generate` asks for."""

    sampling: t.SamplingParams
    pad_token_id: int | None


def read_generation(given: Mapping[str, Any], *, width: int, seed: int) -> Asked:
    """Sampling parameters, with transformers' defaults: greedy unless do_sample, then top_k is 50.

    Args:
        given: keyword arguments of `generate`.
        width: columns of the padded prompts, which max_length and min_length count.
        seed: taken if none is given.

    Raises:
        ValueError: an argument that the server does not know, or does not do.
    """
    config = given.get("generation_config")
    asked = {**_of_config(config), **{name: value for name, value in given.items() if name != "generation_config"}}
    for name, value in asked.items():
        if name in _OFF and value in _OFF[name]:
            continue
        if name not in _KNOWN:
            raise ValueError(f"generate({name}={value!r}) is not supported; of sampling there is {_supported()}")
    sample = bool(asked.get("do_sample"))
    ends = asked.get("eos_token_id")
    end_ids = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    stops = asked.get("stop_strings") or ()
    return Asked(
        t.SamplingParams(
            max_new_tokens=_most(asked, width),
            min_new_tokens=_least(asked, width),
            n=int(asked.get("num_return_sequences") or 1),
            temperature=float(_or(asked.get("temperature"), 1.0)) if sample else 0.0,
            top_k=int(_or(asked.get("top_k", TOP_K), 0)) if sample else 0,
            top_p=float(_or(asked.get("top_p"), 1.0)) if sample else 1.0,
            min_p=float(_or(asked.get("min_p"), 0.0)) if sample else 0.0,
            stop=(stops,) if isinstance(stops, str) else tuple(stops),
            stop_token_ids=tuple(int(end) for end in end_ids if end >= 0),
            ignore_eos=ends is not None,  # then these alone end a completion; -1 is TRL's way to have none
            seed=int(asked.get("seed", seed)),
        ),
        asked.get("pad_token_id"),
    )


def _of_config(config: Any) -> Mapping[str, Any]:
    """What a transformers GenerationConfig says that is not what it says by itself."""
    if config is None:
        return {}
    said: Mapping[str, Any] = config.to_diff_dict()
    return {name: value for name, value in said.items() if name != "transformers_version" and not name.startswith("_")}


def _most(asked: Mapping[str, Any], width: int) -> int:
    if asked.get("max_new_tokens") is not None:
        return int(asked["max_new_tokens"])
    most = int(_or(asked.get("max_length"), MAX_LENGTH)) - width
    if most < 1:
        raise ValueError(f"max_length={most + width} leaves no room behind prompts of {width}; give max_new_tokens")
    return most


def _least(asked: Mapping[str, Any], width: int) -> int:
    if asked.get("min_new_tokens") is not None:
        return int(asked["min_new_tokens"])
    return max(0, int(_or(asked.get("min_length"), 0)) - width)


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _supported() -> str:
    return ", ".join(sorted(_KNOWN - {"tokenizer", "use_cache", "synced_gpus", "attention_mask", "position_ids"}))
