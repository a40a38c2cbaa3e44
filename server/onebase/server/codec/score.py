"""Score: PPO's numbers for a batch, as one job of rows of every adapter, and put together again.

The job's rows come in blocks of one row per sequence: policy, reference, critic, then each reward adapter. A block
whose numbers nobody asked for is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onebase.server.access import Named, need_value_head
from onebase.server.codec.rewards import RewardRows, Term, TermScore, reward_rows
from onebase.server.codec.scoring import (
    adapter_version,
    asked_versions,
    completion_tokens,
    optional_floats,
    paths,
    score_job,
)
from onebase.server.codec.sequences import Pair, SequenceReader
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
    critic: bool
    """Whether the values are a critic's, not the policy's."""

    @property
    def policy(self) -> bool:
        """Whether the policy has to be read."""
        return self.logprobs or self.entropy or (self.values and not self.critic)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a request of Score."""

    policy: Entry
    reference: Named
    critic: Entry | None
    rewards: list[Term]


@dataclass(frozen=True)
class ScorePlan:
    """A checked request of Score."""

    adapters: Adapters
    outputs: Outputs
    pairs: list[Pair]
    rewards: RewardRows
    job: ScoreJob

    def response(self, result: ScoreResult, active: str) -> inference_pb2.ScoreResponse:
        """The results in the request's order; `active` is the session's active adapter now."""
        count, rows = len(self.pairs), iter(result.rows)
        blocks = [
            [next(rows) if asked else _NOTHING for _ in range(count)]
            for asked in (self.outputs.policy, self.outputs.reference_logprobs, self.outputs.critic)
        ]
        scored = list(rows)
        results = [
            self._result(index, policy, reference, critic, self.rewards.scores(scored, index))
            for index, (policy, reference, critic) in enumerate(zip(*blocks, strict=True))
        ]
        critic = self.adapters.critic
        return inference_pb2.ScoreResponse(
            results=results,
            policy=adapter_version(self.adapters.policy, result.versions),
            reference=adapter_version(self.adapters.reference, result.versions),
            rewards=[adapter_version(term.adapter, result.versions) for term in self.adapters.rewards],
            ppo_adapter_name=active,
            critic=adapter_version(critic, result.versions) if critic else None,
        )

    def _result(
        self, index: int, policy: RowResult, reference: RowResult, critic: RowResult, scores: list[TermScore]
    ) -> inference_pb2.ScoreResult:
        return inference_pb2.ScoreResult(
            logprobs=optional_floats(policy.logprobs),
            reference_logprobs=optional_floats(reference.logprobs),
            values=optional_floats(critic.values if self.outputs.critic else policy.values),
            entropy=optional_floats(policy.entropy),
            scores=[one.score for one in scores],
            reward=self.rewards.weighted(scores),
            completion_tokens=completion_tokens(self.pairs[index]),
            eos_appended=[one.eos_appended for one in scores],
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
        critic=bool(request.critic),
    )
    if request.critic and not outputs.values:
        raise InvalidArgument(
            "UNUSED_FIELD",
            f"critic is {request.critic!r}, and outputs does not ask for values: add SCORE_OUTPUT_VALUES",
            field="critic",
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


async def read_score(
    request: inference_pb2.ScoreRequest, adapters: Adapters, outputs: Outputs, reader: SequenceReader
) -> ScorePlan:
    """Checks a request of Score whose adapters are known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_VALUE_HEAD; NO_EOS_TOKEN.
    """
    versions = asked_versions(request, adapters.policy)
    if outputs.values and adapters.critic is None:
        need_value_head(
            adapters.policy, "outputs", "create or load the policy with value_head, name a critic, or leave values out"
        )
    pairs = await reader.pairs(request.sequences, paths(len(request.sequences)))
    joined = await reader.joined(request.sequences, pairs) if adapters.rewards else []
    rewards = reward_rows(request, adapters.rewards, joined, reader, per_token=False)
    rows = [*_rows(adapters, outputs, pairs), *rewards.rows]
    return ScorePlan(adapters, outputs, pairs, rewards, score_job(rows, versions))


def _rows(adapters: Adapters, outputs: Outputs, pairs: list[Pair]) -> Iterator[ScoreRow]:
    if outputs.policy:
        for pair in pairs:
            yield ScoreRow(
                adapter=adapters.policy.uid,
                tokens=pair.tokens,
                start=pair.start,
                logprobs=outputs.logprobs,
                entropy=outputs.entropy,
                values=outputs.values and not outputs.critic,
            )
    if outputs.reference_logprobs:
        for pair in pairs:
            yield ScoreRow(adapter=adapters.reference.uid, tokens=pair.tokens, start=pair.start, logprobs=True)
    if adapters.critic is not None:
        for pair in pairs:
            yield ScoreRow(adapter=adapters.critic.uid, tokens=pair.tokens, start=pair.start, values=True)
