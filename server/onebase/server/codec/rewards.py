"""Reward terms, for Reward and Score: which adapters and labels, what each adapter reads, and the weighted sum.

An adapter reads each sequence once, in one row, however many of its labels are asked for. Adapters may read different
tokens: one may want an end-of-sequence token where another does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onebase.server.codec.adapters import read_pooling
from onebase.server.codec.fields import finite, optional, optional_int, out_of_range
from onebase.server.codec.scoring import adapter_version, score_job
from onebase.server.codec.sequences import Joined, RewardTokens, SequenceReader
from onebase.server.codec.tensors import float_tensor
from onebase.server.errors import InvalidArgument
from onebase.server.jobs import Floats, RowResult, ScoreJob, ScoreResult, ScoreRow
from onebase.server.registry import Entry
from onebase.v1 import inference_pb2

Request = inference_pb2.RewardRequest | inference_pb2.ScoreRequest


@dataclass(frozen=True)
class Term:
    """A label of a reward adapter and its share of the reward."""

    adapter: Entry
    label: int
    weight: float


@dataclass(frozen=True)
class TermScore:
    """What one term says of one sequence of `tokens` tokens."""

    score: float
    token_scores: Floats | None  # [tokens]
    tokens: int
    eos_appended: bool


def read_terms(request: Request, adapters: Sequence[Entry]) -> list[Term]:
    """The reward terms of a request.

    Args:
        request: its `rewards` may be empty.
        adapters: what they name, one each; without names, the server's only one.

    Raises:
        InvalidArgument: REQUIRED and OUT_OF_RANGE for a label; NOT_FINITE for a weight; DUPLICATE_TERM.
    """
    if not request.rewards:
        return [Term(adapter, _only_label(adapter), 1.0) for adapter in adapters]
    terms: list[Term] = []
    for index, (given, adapter) in enumerate(zip(request.rewards, adapters, strict=True)):
        field = f"rewards[{index}]"
        term = Term(
            adapter,
            label=_read_label(optional_int(given, "label"), adapter, f"{field}.label"),
            weight=finite(optional(given, "weight", 1.0), f"{field}.weight"),
        )
        if any(other.adapter is adapter and other.label == term.label for other in terms):
            raise InvalidArgument(
                "DUPLICATE_TERM",
                f"{field} names label {term.label} of {adapter.name!r} again: name it once, and add the weights",
                field=f"{field}.adapter",
            )
        terms.append(term)
    return terms


def _read_label(label: int | None, adapter: Entry, field: str) -> int:
    labels = adapter.facts.num_labels
    if label is None:
        if labels > 1:
            raise InvalidArgument(
                "REQUIRED",
                f"{field} is not set, and {adapter.name!r} has {labels} labels: give one of 0 to {labels - 1}, and "
                "name a term for each label that you want",
                field=field,
            )
        return 0
    if not 0 <= label < labels:
        raise out_of_range(field, label, f"0 to {labels - 1}, the labels of {adapter.name!r}")
    return label


def _only_label(adapter: Entry) -> int:
    if adapter.facts.num_labels > 1:
        raise InvalidArgument(
            "REQUIRED",
            f"rewards is empty, and the server's only reward adapter, {adapter.name!r}, has {adapter.facts.num_labels} "
            "labels: name it with the label in rewards[0].label",
            field="rewards",
        )
    return 0


@dataclass(frozen=True)
class RewardRows:
    """The rows that the terms need: every sequence under the first adapter, then under the next."""

    terms: list[Term]
    inputs: Mapping[int, list[RewardTokens]]  # what each adapter reads, by its uid
    rows: list[ScoreRow]

    def scores(self, results: Sequence[RowResult], sequence: int) -> list[TermScore]:
        """What the terms say of one of the sequences, from the results of all rows."""
        return [self._score(term, results, sequence) for term in self.terms]

    def _score(self, term: Term, results: Sequence[RowResult], sequence: int) -> TermScore:
        uid = term.adapter.uid
        block, one = list(self.inputs).index(uid), self.inputs[uid][sequence]
        row = results[block * len(self.inputs[uid]) + sequence]
        return TermScore(
            score=float("nan") if row.scores is None else float(row.scores[term.label]),
            token_scores=None if row.token_scores is None else row.token_scores[:, term.label],
            tokens=int(one.tokens.size),
            eos_appended=one.eos_appended,
        )

    def weighted(self, scores: Sequence[TermScore]) -> float:
        """The weighted sum of the terms' scores."""
        return sum(term.weight * one.score for term, one in zip(self.terms, scores, strict=True))


def reward_rows(
    request: Request, terms: list[Term], joined: Sequence[Joined], reader: SequenceReader, *, per_token: bool
) -> RewardRows:
    """The rows of the terms: what the request says of `append_eos` and `pooling`, or else what each adapter declares.

    Raises:
        InvalidArgument: OUT_OF_RANGE for a pooling rule; CONTEXT_TOO_LONG; LIMIT_EXCEEDED.
        FailedPrecondition: NO_EOS_TOKEN.
    """
    pooling = read_pooling(request.pooling)
    append_eos = request.append_eos if request.HasField("append_eos") else None
    inputs: dict[int, list[RewardTokens]] = {}
    rows: list[ScoreRow] = []
    for adapter in (term.adapter for term in terms):
        if adapter.uid in inputs:
            continue
        facts = adapter.facts
        read = reader.reward_tokens(joined, facts.append_eos if append_eos is None else append_eos)
        inputs[adapter.uid] = read
        rows += [
            ScoreRow(
                adapter=adapter.uid,
                tokens=one.tokens,
                score=True,
                token_scores=per_token,
                score_at=reader.score_at(one.tokens, pooling or facts.pooling),
            )
            for one in read
        ]
    return RewardRows(terms, inputs, rows)


@dataclass(frozen=True)
class RewardPlan:
    """A checked request of Reward."""

    rewards: RewardRows
    sequences: int
    job: ScoreJob

    def response(self, result: ScoreResult, active: str) -> inference_pb2.RewardResponse:
        """The results in the request's order; `active` is the session's active adapter now."""
        return inference_pb2.RewardResponse(
            results=[self._result(result.rows, index) for index in range(self.sequences)],
            rewards=[adapter_version(term.adapter, result.versions) for term in self.rewards.terms],
            ppo_adapter_name=active,
        )

    def _result(self, rows: Sequence[RowResult], index: int) -> inference_pb2.RewardResult:
        scores = self.rewards.scores(rows, index)
        return inference_pb2.RewardResult(
            scores=[one.score for one in scores],
            token_scores=[float_tensor(one.token_scores) for one in scores if one.token_scores is not None],
            tokens=[one.tokens for one in scores],
            eos_appended=[one.eos_appended for one in scores],
            reward=self.rewards.weighted(scores),
        )


async def read_reward(request: inference_pb2.RewardRequest, terms: list[Term], reader: SequenceReader) -> RewardPlan:
    """Checks a request of Reward whose terms are known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_EOS_TOKEN.
    """
    joined = await reader.joined(request.sequences)
    rewards = reward_rows(request, terms, joined, reader, per_token=request.per_token)
    return RewardPlan(rewards, len(joined), score_job(rewards.rows))
