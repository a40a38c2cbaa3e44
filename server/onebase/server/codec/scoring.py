"""Logprob and ReferenceLogprob: their requests as score jobs, and the results put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onebase.server.access import Named, need_value_head
from onebase.server.codec.fields import version
from onebase.server.codec.sequences import Pair, SequenceReader
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
    if request.return_logits:
        reader.check_logits(pairs, "return_logits")
    rows = [
        ScoreRow(
            adapter=adapter.uid,
            tokens=pair.tokens,
            start=pair.start,
            logprobs=True,
            entropy=request.return_entropy,
            values=request.return_values,
            logits=request.return_logits,
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


def paths(count: int) -> list[str]:
    """The path of each of a request's sequences."""
    return [f"sequences[{index}]" for index in range(count)]


def _logprob_result(pair: Pair, row: RowResult) -> inference_pb2.LogprobResult:
    return inference_pb2.LogprobResult(
        logprobs=optional_floats(row.logprobs),
        entropy=optional_floats(row.entropy),
        values=optional_floats(row.values),
        completion_tokens=completion_tokens(pair),
        logits=optional_floats(row.logits),
    )


def optional_floats(values: Floats | None) -> types_pb2.Tensor | None:
    """A tensor, or None for what was not asked for."""
    return None if values is None else float_tensor(values)
