"""InferenceService: generate, logprobs, rewards, and PPO's numbers in one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

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
    encode_prompts,
    encode_sequences,
    pair,
)
from onebase.client.errors import InternalError
from onebase.v1 import inference_pb2 as pb

Prompts: TypeAlias = "t.Content | SequenceABC[t.Content]"
"""One prompt or several, each a text, token ids or a conversation."""
Sequences: TypeAlias = "t.Sequence | Iterable[t.Sequence]"
"""One sequence or several."""
Rewards: TypeAlias = "str | Mapping[str, float] | SequenceABC[str] | None"
"""Reward adapters: one, several, several with weights, or None for the server's only one."""

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

Number = TypeVar("Number", np.float32, np.int32)

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
        )
        for result in response.results
    ]


# ----------------------------------------------------------------------------------------------------- rewards


def reward(
    sequences: Sequences,
    adapters: str | SequenceABC[str] | None,
    *,
    append_eos: bool | None,
    per_token: bool,
    ppo_adapter_name: str = "",
    session_id: str = "",
) -> Call[tuple[list[t.Reward], str]]:
    """Reward; answers with the rewards and the session's active adapter."""
    if adapters is not None and not adapters:
        raise ValueError("adapters is empty; name reward adapters, or give None for the server's only one")
    request = build(
        pb.RewardRequest,
        session_id=session_id,
        adapters=[] if adapters is None else as_list(adapters, str, "adapters"),
        sequences=encode_sequences(sequences),
        append_eos=append_eos,
        per_token=per_token,
        ppo_adapter_name=ppo_adapter_name,
    )
    return REWARD.call(request, partial(_read_rewards, per_token=per_token))


def _read_rewards(response: pb.RewardResponse, *, per_token: bool) -> tuple[list[t.Reward], str]:
    names = [adapter.name for adapter in response.adapters]
    versions = {adapter.name: adapter.version for adapter in response.adapters}
    rewards = [
        t.Reward(
            scores=pair(names, result.scores),
            token_scores=pair(names, _rows(result)) if per_token else None,
            tokens=result.tokens,
            eos_appended=result.eos_appended,
            versions=versions,
        )
        for result in response.results
    ]
    return rewards, response.ppo_adapter_name


def _rows(result: pb.RewardResult) -> list[NDArray[np.float32]]:
    return list(decode_array(result.token_scores, np.float32))


# ------------------------------------------------------------------------------------------------------- score


def score(
    sequences: Sequences,
    *,
    rewards: Rewards,
    reference: str,
    outputs: Collection[t.ScoreOutput] | None,
    append_eos: bool | None,
    ppo_adapter_name: str,
    adapter_version: int | None,
    session_id: str = "",
) -> Call[tuple[list[t.Score], str]]:
    """Score; answers with the scores and the session's active adapter."""
    request = build(
        pb.ScoreRequest,
        session_id=session_id,
        ppo_adapter_name=ppo_adapter_name,
        adapter_version=adapter_version,
        reference=reference,
        rewards=_encode_rewards(rewards, asked=outputs is None or "rewards" in outputs),
        sequences=encode_sequences(sequences),
        append_eos=append_eos,
        outputs=_encode_outputs(outputs),
    )
    return SCORE.call(request, _read_scores)


def _encode_rewards(rewards: Rewards, *, asked: bool) -> list[pb.RewardTerm]:
    if rewards is None:
        return []
    if not rewards and asked:
        raise ValueError('rewards is empty; give None for the server\'s only one, or leave "rewards" out of outputs')
    if isinstance(rewards, Mapping):
        return [build(pb.RewardTerm, "rewards: ", adapter=name, weight=weight) for name, weight in rewards.items()]
    return [build(pb.RewardTerm, "rewards: ", adapter=name) for name in as_list(rewards, str, "rewards")]


def _encode_outputs(outputs: Collection[t.ScoreOutput] | None) -> list[int]:
    if outputs is None:
        return []
    if not outputs:
        raise ValueError(f"outputs is empty; name some of {', '.join(SCORE_OUTPUTS)}, or give None for the usual four")
    return [encode_name(SCORE_OUTPUTS, name, "outputs") for name in outputs]


def _read_scores(response: pb.ScoreResponse) -> tuple[list[t.Score], str]:
    policy, reference = decode_version(response.policy), decode_version(response.reference)
    names = [adapter.name for adapter in response.rewards]
    scores = [
        t.Score(
            logprobs=decode_floats(result, "logprobs"),
            reference_logprobs=decode_floats(result, "reference_logprobs"),
            values=decode_floats(result, "values"),
            entropy=decode_floats(result, "entropy"),
            scores=pair(names, result.scores) if result.scores else {},
            reward=result.reward,
            completion_tokens=decode_tokens(result, "completion_tokens"),
            eos_appended=result.eos_appended,
            policy=policy,
            reference=reference,
        )
        for result in response.results
    ]
    return scores, response.ppo_adapter_name
