"""One PPO step on a batch, the work of TRL 0.11.4's PPOTrainer.step, against a session.

Deviations from TRL: max_grad_norm clips every optimizer step, not only the first; dropout is never on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.trainer.advantages import Advantages, Array, advantages_and_returns, token_rewards
from onebase.trainer.algorithms.experience import Experience
from onebase.trainer.algorithms.gradients import Gradients
from onebase.trainer.algorithms.stepper import Metrics, PolicyStepper, training_sequence
from onebase.trainer.control import RunningMoments, adapt_kl_coef, scale_scores
from onebase.trainer.hyperparameters import PpoConfig
from onebase.trainer.stats import Stats, length_stats, rollout_stats, training_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session


class PpoStepper(PolicyStepper[PpoConfig]):
    """Makes PPO steps with a session's policy, and keeps what lies between them.

    Attributes:
        kl_coef: the coefficient of the next step's KL penalty.
        moments: running moments of the scores, for use_score_scaling.
    """

    name = "ppo"

    def __init__(
        self,
        session: Session,
        config: PpoConfig | None = None,
        *,
        reference: str = "base",
        adapter: str = "",
        critic: str = "",
        critic_learning_rate: float | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        """Begins with the initial KL coefficient. See PolicyStepper.

        Args:
            session: holds the lease of the policy, and of the critic if there is one.
            config: PPO's settings.
            reference: "base" or a frozen adapter.
            adapter: the policy; "" is the session's active adapter.
            critic: an adapter that tells the values and learns them; "" is the policy's own value head.
            critic_learning_rate: the critic's; None is the policy's.
            rng: draws the minibatches; without one, a generator of seed 0.
        """
        super().__init__(session, config or PpoConfig(), reference=reference, adapter=adapter, rng=rng)
        self._critic = critic
        self._critic_gradients = Gradients(session, critic)
        self._critic_learning_rate = self.config.learning_rate if critic_learning_rate is None else critic_learning_rate
        self.kl_coef = self.config.init_kl_coef
        self.moments = RunningMoments()

    @property
    def outputs(self) -> tuple[t.ScoreOutput, ...]:
        """What `update` needs of every completion besides its score."""
        return ("logprobs", "reference_logprobs", "values")

    def state(self) -> dict[str, Any]:
        """The KL coefficient and the scores' moments."""
        return {"kl_coef": self.kl_coef, "moments": asdict(self.moments)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.kl_coef = state["kl_coef"]
        self.moments = RunningMoments(**state["moments"])

    def update(self, experience: Experience) -> Stats:
        """Trains on a batch; returns TRL's statistics, by TRL's names."""
        config, times, mask = self.config, Stopwatch(), experience.mask
        logprobs, reference = experience.logprobs, cast("Array", experience.reference_logprobs)
        scores, moments = self._scale(experience.scores)
        rewards = token_rewards(scores, logprobs, reference, mask, self.kl_coef, config.kl_penalty)
        compute_rewards = times.lap()
        estimate = advantages_and_returns(
            cast("Array", experience.values),
            rewards.rewards,
            mask,
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
        )
        compute_advantages = times.lap()
        passes = self._train(experience, estimate)
        optimize_step = times.lap()
        stats = rollout_stats(scores, logprobs, reference, rewards, mask, self.kl_coef)
        stats |= length_stats(experience.query_lengths, [len(response) for response in experience.responses])
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

    def _train(self, experience: Experience, estimate: Advantages) -> list[Metrics]:
        config = self.config
        vf_coef = 0.0 if self._critic else config.vf_coef
        loss = t.PpoLoss(config.cliprange, config.cliprange_value, vf_coef, config.ratio_threshold)
        of_policy = {"old_logprobs": experience.logprobs, "advantages": estimate.advantages}
        of_values = {"old_values": estimate.values, "returns": estimate.returns}
        rows = range(len(experience.responses))
        values = [training_sequence(experience, index, **of_values) for index in rows] if self._critic else []
        batch = [
            training_sequence(experience, index, **of_policy, **({} if self._critic else of_values)) for index in rows
        ]

        def one_pass(chosen: NDArray[np.int64], version: int) -> Metrics:
            # Each loss is the mean over its own tokens, divided by the passes that accumulate, as accelerate does.
            accumulated = config.gradient_accumulation_steps
            denominator = None if accumulated == 1 else float(accumulated * experience.lengths[chosen].sum())
            metrics = self._forward_backward([batch[index] for index in chosen], loss, version, denominator)
            if self._critic:
                return self._with_critic(metrics, [values[index] for index in chosen], denominator)
            return metrics

        def too_far(last: Metrics) -> bool:
            return config.early_stopping and last["policy/policykl"] > 1.5 * config.target_kl

        return self._optimize(experience, config.ppo_epochs, one_pass, enough=too_far)

    def _with_critic(
        self, metrics: Metrics, minibatch: Sequence[t.TrainingSequence], denominator: float | None
    ) -> Metrics:
        """Adds the value loss to the critic's gradients; the policy's metrics with the critic's among them.

        vf_coef has no part in the critic's gradients, which nothing else is added to.
        """
        loss = t.ValueLoss(self.config.cliprange_value)
        result = self._critic_gradients.add(minibatch, loss, denominator=denominator)
        of_critic = self._undivided(result.metrics)
        total = metrics["loss/policy"] + self.config.vf_coef * of_critic["loss/value"]
        return {**metrics, **of_critic, "loss/total": total}

    def _optim_step(self, version: int) -> int:
        if self._critic:
            self._critic_gradients.step(self._critic_learning_rate, self.config.max_grad_norm)
        return super()._optim_step(version)

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
