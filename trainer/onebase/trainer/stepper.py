"""One PPO step on a batch, the work of TRL 0.11.4's PPOTrainer.step, against a session.

Knows nothing of where prompts, completions and scores come from. The model's numbers come from one Score call; the
gradients and the optimizer are the server's; everything between is arithmetic here.

Deviations from TRL: max_grad_norm clips every optimizer step, not only the first; dropout is never on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onebase.client import types as t
from onebase.client.errors import FailedPreconditionError
from onebase.trainer.advantages import Advantages, Array, Mask, advantages_and_returns, pad, token_rewards
from onebase.trainer.config import PpoConfig
from onebase.trainer.control import RunningMoments, adapt_kl_coef, scale_scores
from onebase.trainer.stats import Stats, length_stats, rollout_stats, training_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

PPO_OUTPUTS: tuple[t.ScoreOutput, ...] = ("logprobs", "reference_logprobs", "values")
"""What `update` needs of a Score call."""

REFERENCE_OUTPUTS: tuple[t.ScoreOutput, ...] = ("reference_logprobs",)
"""The same, where an exact server gave the policy's numbers with the completions."""


GRADIENTS_LOST = "GRADIENTS_LOST"
"""The reason that a server gives when it does not have the gradients any more that a call builds upon."""

Minibatch = Sequence[t.TrainingSequence]
Result = TypeVar("Result")


class PpoStepper:
    """Makes PPO steps with a session's policy, and keeps what lies between them.

    Attributes:
        kl_coef: the coefficient of the next step's KL penalty.
        moments: running moments of the scores, for use_score_scaling.
        version: the policy's version after the last step; None before the first.
    """

    def __init__(
        self,
        session: Session,
        config: PpoConfig | None = None,
        *,
        reference: str = "base",
        adapter: str = "",
        rng: np.random.Generator | None = None,
    ) -> None:
        """Begins with the initial KL coefficient.

        Args:
            session: holds the lease of the policy.
            config: PPO's settings.
            reference: "base" or a frozen adapter.
            adapter: the policy; "" is the session's active adapter.
            rng: draws the minibatches; without one, a generator of seed 0.
        """
        self.config = config or PpoConfig()
        self.kl_coef = self.config.init_kl_coef
        self.moments = RunningMoments()
        self.version: int | None = None
        self._session = session
        self._reference = reference
        self._adapter = adapter
        self._rng = rng or np.random.default_rng(0)

    def step(
        self,
        queries: Sequence[t.Tokens],
        responses: Sequence[t.Tokens],
        scores: ArrayLike,
        response_masks: Sequence[ArrayLike] | None = None,
    ) -> Stats:
        """Scores a batch under the policy and the reference, and trains on it.

        Args:
            queries: token ids of each query, batch_size of them.
            responses: token ids of each response, at least one each.
            scores: the reward of each response, [batch_size].
            response_masks: for each response, which of its tokens count; all without it.

        Returns:
            TRL's statistics, by TRL's names.

        Raises:
            ValueError: lengths that do not fit together, or a score that is not finite.
        """
        times = Stopwatch()
        self._check(queries, responses)
        sequences = [t.Sequence(query, response) for query, response in zip(queries, responses, strict=True)]
        scored = self._session.score(
            sequences,
            rewards=None,
            reference=self._reference,
            outputs=PPO_OUTPUTS,
            ppo_adapter_name=self._adapter,
        )
        forward = times.lap()
        stats = self.update(
            queries, responses, scored, scores, response_masks, query_lengths=[len(query) for query in queries]
        )
        return stats | {"time/ppo/forward_pass": forward, "time/ppo/total": forward + times.lap()}

    def update(
        self,
        queries: Sequence[t.Content],
        responses: Sequence[t.Tokens],
        scored: Sequence[t.Score],
        scores: ArrayLike,
        response_masks: Sequence[ArrayLike] | None = None,
        *,
        query_lengths: Sequence[int],
    ) -> Stats:
        """Like `step`, for a batch that is scored already: `scored` holds PPO_OUTPUTS of each sequence.

        Queries may be texts here, so `query_lengths` says how many tokens they are.
        """
        config, times = self.config, Stopwatch()
        self._check(queries, responses)
        mask = _masks(responses, response_masks)
        raw_scores = _scores(scores, len(queries))
        width = mask.shape[1]
        logprobs = pad([_asked(score.logprobs) for score in scored], width)
        reference = pad([_asked(score.reference_logprobs) for score in scored], width)
        values = pad([_asked(score.values) for score in scored], width)
        final_scores, moments = self._scale(raw_scores)
        rewards = token_rewards(final_scores, logprobs, reference, mask, self.kl_coef, config.kl_penalty)
        compute_rewards = times.lap()
        estimate = advantages_and_returns(
            values, rewards.rewards, mask, gamma=config.gamma, lam=config.lam, whiten_rewards=config.whiten_rewards
        )
        compute_advantages = times.lap()
        batch = _training_sequences(queries, responses, logprobs, estimate, mask)
        passes = self._optimize(batch, scored[0].policy.version)
        optimize_step = times.lap()
        stats = rollout_stats(final_scores, logprobs, reference, rewards, mask, self.kl_coef)
        stats |= length_stats(query_lengths, [len(response) for response in responses])
        stats |= training_stats(passes, estimate.advantages, mask)
        stats |= {
            "ppo/learning_rate": config.learning_rate,
            "time/ppo/compute_rewards": compute_rewards,
            "time/ppo/compute_advantages": compute_advantages,
            "time/ppo/optimize_step": optimize_step,
            "time/ppo/calc_stats": times.lap(),
        }
        self.moments = moments
        self._adapt(cast("float", stats["objective/kl"]))
        return stats

    def _optimize(self, batch: Sequence[t.TrainingSequence], version: int) -> list[Mapping[str, float]]:
        """Goes through the batch ppo_epochs times in minibatches; returns the metrics of every pass."""
        config = self.config
        accumulate = config.gradient_accumulation_steps
        passes: list[Mapping[str, float]] = []
        pending: list[Minibatch] = []  # whose gradients wait for an optimizer step
        for _ in range(config.ppo_epochs):
            order = self._rng.permutation(len(batch))
            for start in range(0, len(batch), config.mini_batch_size):
                minibatch = [batch[index] for index in order[start : start + config.mini_batch_size]]
                result = self._forward_backward(minibatch, pending, version)
                pending.append(minibatch)
                passes.append(_undivided(result.metrics, accumulate))
                if len(passes) % accumulate == 0:
                    version = self._optim_step(pending, version)
                    pending = []
            if config.early_stopping and passes[-1]["policy/policykl"] > 1.5 * config.target_kl:
                break
        self.version = version
        return passes

    def _forward_backward(self, minibatch: Minibatch, pending: Sequence[Minibatch], version: int) -> t.ForwardBackward:
        """One pass, behind those that are pending."""
        config = self.config
        loss = t.PpoLoss(config.cliprange, config.cliprange_value, config.vf_coef, config.ratio_threshold)

        def call() -> t.ForwardBackward:
            return self._session.forward_backward(
                minibatch,
                loss,
                adapter=self._adapter,
                denominator=_denominator(minibatch, config.gradient_accumulation_steps),
                expected_version=version,
                expected_pending=len(pending),
            )

        return self._with_gradients(call, pending, version)

    def _optim_step(self, pending: Sequence[Minibatch], version: int) -> int:
        def call() -> t.OptimStep:
            return self._session.optim_step(
                t.AdamW(learning_rate=self.config.learning_rate),
                max_grad_norm=self.config.max_grad_norm or 0.0,
                adapter=self._adapter,
                expected_version=version,
                expected_pending=len(pending),
            )

        return self._with_gradients(call, pending, version).adapter.version

    def _with_gradients(self, call: Callable[[], Result], pending: Sequence[Minibatch], version: int) -> Result:
        """Makes a call that needs the pending gradients; makes those again where a restarted server has lost them."""
        while True:
            try:
                return call()
            except FailedPreconditionError as error:
                if error.reason != GRADIENTS_LOST or not pending:
                    raise
            for index, minibatch in enumerate(pending):
                self._forward_backward(minibatch, pending[:index], version)

    def _scale(self, scores: Array) -> tuple[Array, RunningMoments]:
        moments = self.moments
        if self.config.use_score_scaling:
            scores, moments = scale_scores(scores, moments, normalize=self.config.use_score_norm)
        if self.config.score_clip is not None:
            scores = np.clip(scores, -self.config.score_clip, self.config.score_clip)
        return scores, moments

    def _adapt(self, kl: float) -> None:
        config = self.config
        if config.adap_kl_ctrl:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, kl, target=config.target, horizon=config.horizon, sequences=config.batch_size
            )

    def _check(self, queries: Sequence[t.Content], responses: Sequence[t.Tokens]) -> None:
        for name, given in (("queries", queries), ("responses", responses)):
            if len(given) != self.config.batch_size:
                raise ValueError(f"{name} holds {len(given)}, but batch_size is {self.config.batch_size}")
        for index, response in enumerate(responses):
            if len(response) == 0:
                raise ValueError(f"responses[{index}] is empty; a response has at least one token")


def _scores(scores: ArrayLike, count: int) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (count,):
        raise ValueError(f"scores has shape {list(values.shape)}; it must hold one number for each of {count} queries")
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"scores[{index}] is {values[index]}; scores must be finite")
    return values


def _masks(responses: Sequence[t.Tokens], given: Sequence[ArrayLike] | None) -> Mask:
    """[B, T], True where a token is there and counts."""
    lengths = np.array([len(response) for response in responses])
    mask: Mask = np.arange(lengths.max()) < lengths[:, None]
    if given is None:
        return mask
    if len(given) != len(responses):
        raise ValueError(f"response_masks holds {len(given)}, but there are {len(responses)} responses")
    for row, counts in enumerate(given):
        flags = np.asarray(counts, dtype=bool)
        if flags.shape != (lengths[row],):
            raise ValueError(f"response_masks[{row}] has shape {list(flags.shape)}, its response {lengths[row]} tokens")
        if not flags.any():
            raise ValueError(f"response_masks[{row}] leaves out every token; its score would have no place")
        mask[row, : lengths[row]] = flags
    return mask


def _asked(numbers: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if numbers is None:
        raise ValueError(f"a score lacks one of {', '.join(PPO_OUTPUTS)}; ask Score for all of them")
    return numbers


def _training_sequences(
    queries: Sequence[t.Content], responses: Sequence[t.Tokens], logprobs: Array, estimate: Advantages, mask: Mask
) -> list[t.TrainingSequence]:
    def row(numbers: Array, index: int) -> NDArray[np.float32]:
        return numbers[index, : len(responses[index])].astype(np.float32)

    return [
        t.TrainingSequence(
            # A text goes over the wire as it is, so that the server tokenizes it as it did for Score.
            prompt=cast("t.Tokens", query),
            completion=responses[index],
            old_logprobs=row(logprobs, index),
            old_values=row(estimate.values, index),
            advantages=row(estimate.advantages, index),
            returns=row(estimate.returns, index),
            mask=mask[index, : len(responses[index])],
        )
        for index, query in enumerate(queries)
    ]


def _denominator(minibatch: Sequence[t.TrainingSequence], accumulate: int) -> float | None:
    """Each accumulated loss is the mean over its own tokens, divided by the number of passes, as accelerate does."""
    if accumulate == 1:
        return None
    return float(
        accumulate * sum(len(row.completion) if row.mask is None else int(row.mask.sum()) for row in minibatch)
    )


def _undivided(metrics: Mapping[str, float], accumulate: int) -> Mapping[str, float]:
    """The metrics with each loss as the mean over its own tokens again, whatever it was divided by."""
    return {name: value * accumulate if name.startswith("loss/") else value for name, value in metrics.items()}
