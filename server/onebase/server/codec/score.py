"""Score: PPO's numbers for a batch, as one job of rows of every adapter, and put together again.

The job's rows come in blocks of one row per sequence: policy, reference, then each reward adapter. A block whose
numbers nobody asked for is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onebase.server.access import Named, need_value_head
from onebase.server.codec.fields import finite, optional
from onebase.server.codec.scoring import (
    adapter_version,
    asked_versions,
    completion_tokens,
    optional_floats,
    paths,
    score_job,
)
from onebase.server.codec.sequences import Pair, RewardTokens, SequenceReader
from onebase.server.errors import InvalidArgument
from onebase.server.jobs import RowResult, ScoreJob, ScoreResult, ScoreRow
from onebase.server.registry import Entry
from onebase.v1 import inference_pb2

_DEFAULT_OUTPUTS = frozenset(
    {
        inference_pb2.SCORE_OUTPUT_LOGPROBS,
        inference_pb2.SCORE_OUTPUT_REFERENCE_LOGPROBS,
        inference_pb2.SCORE_OUTPUT_VALUES,
        inference_pb2.SCORE_OUTPUT_REWARDS,
    }
)
_KNOWN_OUTPUTS = _DEFAULT_OUTPUTS | {inference_pb2.SCORE_OUTPUT_ENTROPY}
_NOTHING = RowResult()


@dataclass(frozen=True)
class Outputs:
    """Which numbers a request of Score asks for."""

    logprobs: bool
    reference_logprobs: bool
    values: bool
    rewards: bool
    entropy: bool

    @property
    def policy(self) -> bool:
        """Whether the policy has to be read."""
        return self.logprobs or self.values or self.entropy


@dataclass(frozen=True)
class Adapters:
    """The adapters of a request of Score, and the weight of each reward."""

    policy: Entry
    reference: Named
    rewards: list[Entry]
    weights: list[float]


@dataclass(frozen=True)
class ScorePlan:
    """A checked request of Score."""

    adapters: Adapters
    outputs: Outputs
    pairs: list[Pair]
    reward_inputs: list[RewardTokens]
    job: ScoreJob

    def response(self, result: ScoreResult, active: str) -> inference_pb2.ScoreResponse:
        """The results in the request's order; `active` is the session's active adapter now."""
        blocks = self._blocks(result.rows)
        policy_rows = next(blocks) if self.outputs.policy else None
        reference_rows = next(blocks) if self.outputs.reference_logprobs else None
        reward_blocks = list(blocks)
        results = [
            self._result(
                index,
                policy_rows[index] if policy_rows else _NOTHING,
                reference_rows[index] if reference_rows else _NOTHING,
                [block[index] for block in reward_blocks],
            )
            for index in range(len(self.pairs))
        ]
        return inference_pb2.ScoreResponse(
            results=results,
            policy=adapter_version(self.adapters.policy, result.versions),
            reference=adapter_version(self.adapters.reference, result.versions),
            rewards=[adapter_version(adapter, result.versions) for adapter in self.adapters.rewards],
            ppo_adapter_name=active,
        )

    def _blocks(self, rows: Sequence[RowResult]) -> Iterator[Sequence[RowResult]]:
        count = len(self.pairs)
        return (rows[first : first + count] for first in range(0, len(rows), count))

    def _result(
        self, index: int, policy: RowResult, reference: RowResult, rewards: list[RowResult]
    ) -> inference_pb2.ScoreResult:
        scores = [row.score for row in rewards if row.score is not None]
        return inference_pb2.ScoreResult(
            logprobs=optional_floats(policy.logprobs),
            reference_logprobs=optional_floats(reference.logprobs),
            values=optional_floats(policy.values),
            entropy=optional_floats(policy.entropy),
            scores=scores,
            reward=sum(weight * score for weight, score in zip(self.adapters.weights, scores, strict=True)),
            completion_tokens=completion_tokens(self.pairs[index]),
            eos_appended=bool(rewards) and self.reward_inputs[index].eos_appended,
        )


def read_outputs(request: inference_pb2.ScoreRequest) -> Outputs:
    """What to compute.

    Raises:
        InvalidArgument: OUT_OF_RANGE for what is no output; UNUSED_FIELD for what is named and not asked for.
    """
    for index, output in enumerate(request.outputs):
        if output not in _KNOWN_OUTPUTS:
            field = f"outputs[{index}]"
            raise InvalidArgument(
                "OUT_OF_RANGE", f"{field} is {output}: use a SCORE_OUTPUT that is specified", field=field
            )
    asked = frozenset(request.outputs) or _DEFAULT_OUTPUTS
    outputs = Outputs(
        logprobs=inference_pb2.SCORE_OUTPUT_LOGPROBS in asked,
        reference_logprobs=inference_pb2.SCORE_OUTPUT_REFERENCE_LOGPROBS in asked,
        values=inference_pb2.SCORE_OUTPUT_VALUES in asked,
        rewards=inference_pb2.SCORE_OUTPUT_REWARDS in asked,
        entropy=inference_pb2.SCORE_OUTPUT_ENTROPY in asked,
    )
    if request.HasField("adapter_version") and not outputs.policy:
        raise InvalidArgument(
            "UNUSED_FIELD",
            "adapter_version is set, and outputs asks for nothing of the policy: leave it out",
            field="adapter_version",
        )
    if request.rewards and not outputs.rewards:
        raise InvalidArgument(
            "UNUSED_FIELD",
            "rewards are named, and outputs does not ask for them: add SCORE_OUTPUT_REWARDS",
            field="rewards",
        )
    return outputs


def read_weights(request: inference_pb2.ScoreRequest, outputs: Outputs) -> list[float]:
    """The weight of each reward term: one of 1 where none is named, none where rewards are not asked for.

    Raises:
        InvalidArgument: NOT_FINITE.
    """
    weights = [finite(optional(term, "weight", 1.0), f"rewards[{i}].weight") for i, term in enumerate(request.rewards)]
    return weights or ([1.0] if outputs.rewards else [])


async def read_score(
    request: inference_pb2.ScoreRequest, adapters: Adapters, outputs: Outputs, reader: SequenceReader
) -> ScorePlan:
    """Checks a request of Score whose adapters are known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_VALUE_HEAD; NO_EOS_TOKEN.
    """
    versions = asked_versions(request, adapters.policy)
    if outputs.values:
        need_value_head(adapters.policy, "outputs")
    pairs = await reader.pairs(request.sequences, paths(len(request.sequences)))
    inputs: list[RewardTokens] = []
    if outputs.rewards:
        append_eos = request.append_eos if request.HasField("append_eos") else None
        inputs = await reader.reward_tokens(request.sequences, append_eos, pairs)
    rows = list(_rows(adapters, outputs, pairs, inputs))
    return ScorePlan(adapters, outputs, pairs, inputs, score_job(rows, versions))


def _rows(adapters: Adapters, outputs: Outputs, pairs: list[Pair], inputs: list[RewardTokens]) -> Iterator[ScoreRow]:
    if outputs.policy:
        for pair in pairs:
            yield ScoreRow(
                adapter=adapters.policy.uid,
                tokens=pair.tokens,
                start=pair.start,
                logprobs=outputs.logprobs,
                entropy=outputs.entropy,
                values=outputs.values,
            )
    if outputs.reference_logprobs:
        for pair in pairs:
            yield ScoreRow(adapter=adapters.reference.uid, tokens=pair.tokens, start=pair.start, logprobs=True)
    for adapter in adapters.rewards:
        for one in inputs:
            yield ScoreRow(adapter=adapter.uid, tokens=one.tokens, score=True)
