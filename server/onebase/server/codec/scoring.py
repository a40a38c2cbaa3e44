"""Logprob, ReferenceLogprob and Reward: their requests as score jobs, and the results put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onebase.server.access import Named, need_value_head
from onebase.server.codec.fields import version
from onebase.server.codec.sequences import Pair, RewardTokens, SequenceReader
from onebase.server.codec.tensors import float_tensor, int_tensor
from onebase.server.jobs import BASE, Floats, RowResult, ScoreJob, ScoreResult, ScoreRow
from onebase.server.registry import Entry
from onebase.v1 import inference_pb2, types_pb2

_INTERACTIVE_ROWS = 16
_INTERACTIVE_TOKENS = 4096


def score_job(rows: Sequence[ScoreRow], versions: Mapping[int, int] | None = None) -> ScoreJob:
    """A job of these rows; a small one is interactive and goes first."""
    small = len(rows) <= _INTERACTIVE_ROWS and sum(row.tokens.size for row in rows) <= _INTERACTIVE_TOKENS
    return ScoreJob(rows=rows, versions=versions or {}, interactive=small)


def asked_versions(
    request: inference_pb2.LogprobRequest | inference_pb2.ScoreRequest, adapter: Named
) -> Mapping[int, int]:
    """The version that must answer, by uid; none for the base, which has but one.

    Raises:
        InvalidArgument: OUT_OF_RANGE for a negative one.
    """
    asked = version(request, "adapter_version")
    return {} if asked is None or adapter.uid == BASE else {adapter.uid: asked}


def adapter_version(adapter: Named, versions: Mapping[int, int]) -> types_pb2.AdapterVersion:
    """The adapter and the version that answered, or its newest if it was not read."""
    newest = adapter.facts.version if isinstance(adapter, Entry) else 0
    return types_pb2.AdapterVersion(name=adapter.name, version=versions.get(adapter.uid, newest))


def completion_tokens(pair: Pair) -> types_pb2.Tensor | None:
    """The completion's ids where the client gave text."""
    return int_tensor(pair.completion) if pair.from_text else None


@dataclass(frozen=True)
class LogprobPlan:
    """A checked request of Logprob or ReferenceLogprob."""

    adapter: Named
    pairs: list[Pair]
    job: ScoreJob

    def response(self, result: ScoreResult) -> inference_pb2.LogprobResponse:
        """The results in the request's order."""
        return inference_pb2.LogprobResponse(
            results=[_logprob_result(pair, row) for pair, row in zip(self.pairs, result.rows, strict=True)],
            adapter=adapter_version(self.adapter, result.versions),
        )


async def read_logprob(request: inference_pb2.LogprobRequest, adapter: Named, reader: SequenceReader) -> LogprobPlan:
    """Checks a request of Logprob whose adapter is known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_VALUE_HEAD.
    """
    versions = asked_versions(request, adapter)
    if request.return_values:
        need_value_head(adapter, "return_values")
    pairs = await reader.pairs(request.sequences, paths(len(request.sequences)))
    rows = [
        ScoreRow(
            adapter=adapter.uid,
            tokens=pair.tokens,
            start=pair.start,
            logprobs=True,
            entropy=request.return_entropy,
            values=request.return_values,
        )
        for pair in pairs
    ]
    return LogprobPlan(adapter, pairs, score_job(rows, versions))


async def read_reference_logprob(
    request: inference_pb2.ReferenceLogprobRequest, reference: Named, reader: SequenceReader
) -> LogprobPlan:
    """Checks a request of ReferenceLogprob whose reference is known.

    Raises:
        InvalidArgument: naming the field.
    """
    pairs = await reader.pairs(request.sequences, paths(len(request.sequences)))
    rows = [ScoreRow(adapter=reference.uid, tokens=pair.tokens, start=pair.start, logprobs=True) for pair in pairs]
    return LogprobPlan(reference, pairs, score_job(rows))


@dataclass(frozen=True)
class RewardPlan:
    """A checked request of Reward. The job's rows are all sequences under the first adapter, then the next."""

    adapters: list[Entry]
    inputs: list[RewardTokens]
    job: ScoreJob

    def response(self, result: ScoreResult, active: str) -> inference_pb2.RewardResponse:
        """The results in the request's order; `active` is the session's active adapter now."""
        count = len(self.inputs)
        return inference_pb2.RewardResponse(
            results=[_reward_result(one, result.rows[index::count]) for index, one in enumerate(self.inputs)],
            adapters=[adapter_version(adapter, result.versions) for adapter in self.adapters],
            ppo_adapter_name=active,
        )


async def read_reward(
    request: inference_pb2.RewardRequest, adapters: list[Entry], reader: SequenceReader
) -> RewardPlan:
    """Checks a request of Reward whose adapters are known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_EOS_TOKEN.
    """
    append_eos = request.append_eos if request.HasField("append_eos") else None
    inputs = await reader.reward_tokens(request.sequences, append_eos)
    rows = [
        ScoreRow(adapter=adapter.uid, tokens=one.tokens, score=True, token_scores=request.per_token)
        for adapter in adapters
        for one in inputs
    ]
    return RewardPlan(adapters, inputs, score_job(rows))


def paths(count: int) -> list[str]:
    """The path of each of a request's sequences."""
    return [f"sequences[{index}]" for index in range(count)]


def _logprob_result(pair: Pair, row: RowResult) -> inference_pb2.LogprobResult:
    return inference_pb2.LogprobResult(
        logprobs=optional_floats(row.logprobs),
        entropy=optional_floats(row.entropy),
        values=optional_floats(row.values),
        completion_tokens=completion_tokens(pair),
    )


def _reward_result(one: RewardTokens, rows: Sequence[RowResult]) -> inference_pb2.RewardResult:
    token_scores = [row.token_scores for row in rows if row.token_scores is not None]
    return inference_pb2.RewardResult(
        scores=[row.score for row in rows if row.score is not None],
        token_scores=float_tensor(np.stack(token_scores)) if token_scores else None,
        tokens=one.tokens.size,
        eos_appended=one.eos_appended,
    )


def optional_floats(values: Floats | None) -> types_pb2.Tensor | None:
    """A tensor, or None for what was not asked for."""
    return None if values is None else float_tensor(values)
