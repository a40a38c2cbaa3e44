"""Sampling parameters of a request."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from onebase.server.codec.fields import integer, number, optional, optional_int, out_of_range
from onebase.server.errors import InvalidArgument
from onebase.server.jobs import BaseFacts, Sampling
from onebase.v1 import inference_pb2

_MAX_STOPS = 64
_MAX_STOP_CHARACTERS = 1024
_MAX_STOP_IDS = 1024
_LEAST_TEMPERATURE = 1e-4  # below this, logits divided by it overflow float32


@dataclass(frozen=True)
class Draws:
    """How to draw, and how often per prompt."""

    sampling: Sampling
    n: int


def read_sampling(message: inference_pb2.SamplingParams, facts: BaseFacts) -> Draws:
    """The parameters with their defaults; a seed is drawn where none is given.

    Raises:
        InvalidArgument: naming the field.
    """
    max_new_tokens = integer(message.max_new_tokens, "sampling.max_new_tokens", least=1, most=facts.max_context - 1)
    seed = optional_int(message, "seed")
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=_temperature(message),
        top_k=integer(message.top_k, "sampling.top_k", least=0),
        top_p=_top_p(message),
        min_p=_min_p(message),
        stop=_stops(message),
        stop_token_ids=_stop_token_ids(message, facts.vocab_size),
        seed=secrets.randbits(63) if seed is None else seed,
        ignore_eos=message.ignore_eos,
        min_new_tokens=integer(message.min_new_tokens, "sampling.min_new_tokens", least=0, most=max_new_tokens),
    )
    return Draws(sampling, n=integer(message.n, "sampling.n", least=0) or 1)


def _temperature(message: inference_pb2.SamplingParams) -> float:
    field = "sampling.temperature"
    temperature = number(optional(message, "temperature", 1.0), field, least=0)
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise out_of_range(field, temperature, f"0 for greedy, or at least {_LEAST_TEMPERATURE:g}")
    return temperature


def _top_p(message: inference_pb2.SamplingParams) -> float:
    field = "sampling.top_p"
    top_p = number(optional(message, "top_p", 1.0), field)
    if not 0 < top_p <= 1:
        raise out_of_range(field, top_p, "a number above 0 and up to 1")
    return top_p


def _min_p(message: inference_pb2.SamplingParams) -> float:
    field = "sampling.min_p"
    min_p = number(message.min_p, field)
    if not 0 <= min_p < 1:
        raise out_of_range(field, min_p, "a number from 0 and below 1")
    return min_p


def _stops(message: inference_pb2.SamplingParams) -> tuple[str, ...]:
    if len(message.stop) > _MAX_STOPS:
        raise out_of_range("sampling.stop", f"a list of {len(message.stop)}", f"at most {_MAX_STOPS}")
    for index, stop in enumerate(message.stop):
        field = f"sampling.stop[{index}]"
        if not stop:
            raise InvalidArgument("REQUIRED", f"{field} is empty: give text, or leave it out", field=field)
        if len(stop) > _MAX_STOP_CHARACTERS:
            raise out_of_range(field, f"{len(stop)} characters", f"at most {_MAX_STOP_CHARACTERS}")
    return tuple(message.stop)


def _stop_token_ids(message: inference_pb2.SamplingParams, vocab_size: int) -> tuple[int, ...]:
    if len(message.stop_token_ids) > _MAX_STOP_IDS:
        raise out_of_range(
            "sampling.stop_token_ids", f"a list of {len(message.stop_token_ids)}", f"at most {_MAX_STOP_IDS}"
        )
    for index, token in enumerate(message.stop_token_ids):
        if not 0 <= token < vocab_size:
            field = f"sampling.stop_token_ids[{index}]"
            raise InvalidArgument(
                "BAD_TOKEN_ID", f"{field} is {token}: token ids of this base are 0 to {vocab_size - 1}", field=field
            )
    return tuple(message.stop_token_ids)
