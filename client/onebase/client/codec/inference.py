"""InferenceService: generate, logprobs, rewards, and PPO's numbers in one call."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from functools import partial
from typing import TypeAlias

import numpy as np

from onebase.client import types as t
from onebase.client.codec.rpc import Call, Rpc
from onebase.client.codec.values import (
    as_list,
    build,
    decode_array,
    decode_floats,
    decode_name,
    decode_tokens,
    decode_version,
    encode_name,
    encode_pooling,
    encode_prompts,
    encode_sequences,
    pair,
)
from onebase.client.errors import InternalError
from onebase.v1 import inference_pb2 as pb
from onebase.v1.types_pb2 import AdapterVersion

Prompts: TypeAlias = "t.Content | SequenceABC[t.Content]"
"""One prompt or several, each a text or token ids."""
Sequences: TypeAlias = "t.Sequence | Iterable[t.Sequence]"
"""One sequence or several."""
Rewards: TypeAlias = "str | t.RewardTerm | Mapping[str, float] | SequenceABC[str | t.RewardTerm] | None"
"""Reward terms: one, several, names with weights, or None for the server's only reward adapter.

A name is "adapter", or "adapter[label]" for a label of a head with several.
"""

GENERATE = Rpc("InferenceService/Generate", pb.GenerateRequest, pb.GenerateResponse, repeatable=True)
LOGPROB = Rpc("InferenceService/Logprob", pb.LogprobRequest, pb.LogprobResponse, repeatable=True)
REFERENCE_LOGPROB = Rpc(
    "InferenceService/ReferenceLogprob", pb.ReferenceLogprobRequest, pb.LogprobResponse, repeatable=True
)
REWARD = Rpc("InferenceService/Reward", pb.RewardRequest, pb.RewardResponse, repeatable=True)
SCORE = Rpc("InferenceService/Score", pb.ScoreRequest, pb.ScoreResponse, repeatable=True)

FINISH_REASONS: Mapping[t.FinishReason, pb.FinishReason.ValueType] = {
    "eos": pb.FINISH_REASON_EOS,
    "stop_string": pb.FINISH_REASON_STOP_STRING,
    "stop_token": pb.FINISH_REASON_STOP_TOKEN,
    "length": pb.FINISH_REASON_LENGTH,
}
SCORE_OUTPUTS: Mapping[t.ScoreOutput, pb.ScoreOutput.ValueType] = {
    "logprobs": pb.SCORE_OUTPUT_LOGPROBS,
    "reference_logprobs": pb.SCORE_OUTPUT_REFERENCE_LOGPROBS,
    "values": pb.SCORE_OUTPUT_VALUES,
    "rewards": pb.SCORE_OUTPUT_REWARDS,
    "entropy": pb.SCORE_OUTPUT_ENTROPY,
}

_LABELLED = re.compile(r"(?P<adapter>[^\[\]]+)\[(?P<label>\d{1,9})\]", re.ASCII)

# ---------------------------------------------------------------------------------------------------- generate


def generate(
    prompts: Prompts,
    *,
    adapter: str,
    sampling: t.SamplingParams,
    logprobs: bool,
    values: bool,
    adapter_version: int | None,
    stream_tokens: bool,
    session_id: str = "",
) -> Call[t.CompletionChunk]:
    """Generate; each message of its stream is a chunk."""
    request = build(
        pb.GenerateRequest,
        session_id=session_id,
        adapter=adapter,
        adapter_version=adapter_version,
        prompts=encode_prompts(prompts),
        sampling=_encode_sampling(sampling),
        return_logprobs=logprobs,
        return_values=values,
        stream_tokens=stream_tokens,
    )
    return GENERATE.call(request, _read_chunk)


def _encode_sampling(sampling: t.SamplingParams) -> pb.SamplingParams:
    return build(pb.SamplingParams, "sampling.", **{**vars(sampling), "stop": as_list(sampling.stop, str, "stop")})


def _read_chunk(message: pb.GenerateResponse) -> t.CompletionChunk:
    tokens = decode_tokens(message, "tokens")
    finished = message.finish_reason != pb.FINISH_REASON_UNSPECIFIED
    return t.CompletionChunk(
        prompt_index=message.prompt_index,
        completion_index=message.completion_index,
        text=message.text,
        tokens=np.zeros(0, np.int32) if tokens is None else tokens,
        logprobs=decode_floats(message, "logprobs"),
        values=decode_floats(message, "values"),
        finish_reason=decode_name(FINISH_REASONS, message.finish_reason) if finished else None,
        adapter=decode_version(message.adapter),
        seed=message.seed,
        prompt_tokens=message.prompt_tokens,
    )


def join_chunks(chunks: Iterable[t.CompletionChunk]) -> list[t.Completion]:
    """The completions of a whole stream, prompt by prompt; InternalError if one has no end."""
    pieces: dict[tuple[int, int], list[t.CompletionChunk]] = {}
    for chunk in chunks:
        pieces.setdefault((chunk.prompt_index, chunk.completion_index), []).append(chunk)
    return [_join(pieces[index]) for index in sorted(pieces)]


def _join(chunks: SequenceABC[t.CompletionChunk]) -> t.Completion:
    first, last = chunks[0], chunks[-1]
    if last.finish_reason is None:
        raise InternalError(
            f"the stream ended before completion {first.completion_index} of prompt {first.prompt_index} did"
        )
    return t.Completion(
        prompt_index=first.prompt_index,
        completion_index=first.completion_index,
        text="".join(chunk.text for chunk in chunks),
        tokens=np.concatenate([chunk.tokens for chunk in chunks]),
        logprobs=_concatenate([chunk.logprobs for chunk in chunks]),
        values=_concatenate([chunk.values for chunk in chunks]),
        finish_reason=last.finish_reason,
        adapter=first.adapter,
        seed=first.seed,
        prompt_tokens=first.prompt_tokens,
    )


def _concatenate(pieces: Iterable[t.Floats | None]) -> t.Floats | None:
    there = [piece for piece in pieces if piece is not None]
    return np.concatenate(there) if there else None


# ---------------------------------------------------------------------------------------------------- logprobs


def logprob(
    sequences: Sequences,
    *,
    adapter: str,
    entropy: bool,
    values: bool,
    logits: bool,
    adapter_version: int | None,
    session_id: str = "",
) -> Call[list[t.Logprobs]]:
    """Logprob."""
    request = build(
        pb.LogprobRequest,
        session_id=session_id,
        adapter=adapter,
        adapter_version=adapter_version,
        sequences=encode_sequences(sequences),
        return_entropy=entropy,
        return_values=values,
        return_logits=logits,
    )
    return LOGPROB.call(request, _read_logprobs)


def reference_logprob(sequences: Sequences, *, reference: str, session_id: str = "") -> Call[list[t.Logprobs]]:
    """ReferenceLogprob."""
    request = build(
        pb.ReferenceLogprobRequest,
        session_id=session_id,
        reference=reference,
        sequences=encode_sequences(sequences),
    )
    return REFERENCE_LOGPROB.call(request, _read_logprobs)


def _read_logprobs(response: pb.LogprobResponse) -> list[t.Logprobs]:
    adapter = decode_version(response.adapter)
    return [
        t.Logprobs(
            logprobs=decode_array(result.logprobs, np.float32),
            entropy=decode_floats(result, "entropy"),
            values=decode_floats(result, "values"),
            completion_tokens=decode_tokens(result, "completion_tokens"),
            adapter=adapter,
            logits=decode_floats(result, "logits"),
        )
        for result in response.results
    ]


# ----------------------------------------------------------------------------------------------------- rewards


def reward(
    sequences: Sequences,
    rewards: Rewards,
    *,
    append_eos: bool | None,
    pooling: t.Pooling | None,
    per_token: bool,
    ppo_adapter_name: str = "",
    session_id: str = "",
) -> Call[tuple[list[t.Reward], str]]:
    """Reward; answers with the rewards and the session's active adapter."""
    terms = _terms(rewards, "rewards is empty; name reward adapters, or give None for the server's only one")
    request = build(
        pb.RewardRequest,
        session_id=session_id,
        rewards=_encode_terms(terms),
        sequences=encode_sequences(sequences),
        append_eos=append_eos,
        per_token=per_token,
        ppo_adapter_name=ppo_adapter_name,
        pooling=encode_pooling(pooling),
    )
    return REWARD.call(request, partial(_read_rewards, terms=terms, per_token=per_token))


def _terms(rewards: Rewards, refusal: str) -> list[t.RewardTerm]:
    """The terms; ValueError with this refusal where they are an empty list, which is not None."""
    if rewards is None:
        return []
    if not rewards and refusal:
        raise ValueError(refusal)
    if isinstance(rewards, str):
        return [_named(rewards)]
    if isinstance(rewards, Mapping):
        return [_named(name, weight) for name, weight in rewards.items()]
    if isinstance(rewards, t.RewardTerm) or not isinstance(rewards, Iterable):
        return as_list(rewards, t.RewardTerm, "rewards")
    return as_list([_named(one) if isinstance(one, str) else one for one in rewards], t.RewardTerm, "rewards")


def _named(name: str, weight: float = 1.0) -> t.RewardTerm:
    """The term of a name: "adapter" or "adapter[label]"."""
    found = _LABELLED.fullmatch(name)
    return t.RewardTerm(found["adapter"], weight, int(found["label"])) if found else t.RewardTerm(name, weight)


def _encode_terms(terms: SequenceABC[t.RewardTerm]) -> list[pb.RewardTerm]:
    return [build(pb.RewardTerm, f"rewards[{i}]: ", **vars(term)) for i, term in enumerate(terms)]


def _keys(terms: SequenceABC[t.RewardTerm], answered: Iterable[AdapterVersion]) -> list[str]:
    """What results call the terms; the server's only adapter by its name."""
    return [term.key for term in terms] or [adapter.name for adapter in answered]


def _read_rewards(
    response: pb.RewardResponse, *, terms: SequenceABC[t.RewardTerm], per_token: bool
) -> tuple[list[t.Reward], str]:
    keys = _keys(terms, response.rewards)
    versions = pair(keys, [adapter.version for adapter in response.rewards])
    rewards = [
        t.Reward(
            scores=pair(keys, result.scores),
            token_scores=pair(keys, [decode_array(one, np.float32) for one in result.token_scores])
            if per_token
            else None,
            reward=result.reward,
            tokens=pair(keys, result.tokens),
            eos_appended=pair(keys, result.eos_appended),
            versions=versions,
        )
        for result in response.results
    ]
    return rewards, response.ppo_adapter_name


# ------------------------------------------------------------------------------------------------------- score


def score(
    sequences: Sequences,
    *,
    rewards: Rewards,
    reference: str,
    outputs: Collection[t.ScoreOutput] | None,
    critic: str,
    append_eos: bool | None,
    pooling: t.Pooling | None,
    ppo_adapter_name: str,
    adapter_version: int | None,
    session_id: str = "",
) -> Call[tuple[list[t.Score], str]]:
    """Score; answers with the scores and the session's active adapter."""
    asked = outputs is None or "rewards" in outputs
    refusal = 'rewards is empty; give None for the server\'s only one, or leave "rewards" out of outputs'
    terms = _terms(rewards, refusal if asked else "")
    request = build(
        pb.ScoreRequest,
        session_id=session_id,
        ppo_adapter_name=ppo_adapter_name,
        adapter_version=adapter_version,
        reference=reference,
        rewards=_encode_terms(terms),
        sequences=encode_sequences(sequences),
        append_eos=append_eos,
        outputs=_encode_outputs(outputs),
        critic=critic,
        pooling=encode_pooling(pooling),
    )
    return SCORE.call(request, partial(_read_scores, terms=terms))


def _encode_outputs(outputs: Collection[t.ScoreOutput] | None) -> list[int]:
    if outputs is None:
        return []
    if not outputs:
        raise ValueError(f"outputs is empty; name some of {', '.join(SCORE_OUTPUTS)}, or give None for the usual four")
    return [encode_name(SCORE_OUTPUTS, name, "outputs") for name in outputs]


def _read_scores(response: pb.ScoreResponse, *, terms: SequenceABC[t.RewardTerm]) -> tuple[list[t.Score], str]:
    policy, reference = decode_version(response.policy), decode_version(response.reference)
    critic = decode_version(response.critic) if response.HasField("critic") else None
    keys = _keys(terms, response.rewards)
    scores = [
        t.Score(
            logprobs=decode_floats(result, "logprobs"),
            reference_logprobs=decode_floats(result, "reference_logprobs"),
            values=decode_floats(result, "values"),
            entropy=decode_floats(result, "entropy"),
            scores=pair(keys, result.scores) if result.scores else {},
            reward=result.reward,
            completion_tokens=decode_tokens(result, "completion_tokens"),
            eos_appended=pair(keys, result.eos_appended) if result.scores else {},
            policy=policy,
            reference=reference,
            critic=critic,
        )
        for result in response.results
    ]
    return scores, response.ppo_adapter_name
