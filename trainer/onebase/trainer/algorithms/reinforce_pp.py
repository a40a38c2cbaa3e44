"""One REINFORCE++ step on a batch (Hu 2025, arXiv:2501.03262), as OpenRLHF makes it.

PPO without a critic: each token's KL penalty is in its reward, the score in the last token's; a token's advantage is
the sum of rewards from it on, normalized over all tokens of the batch. One completion of a prompt is enough. Deviation
from OpenRLHF: the loss is the mean over a minibatch's tokens, not of its completions' means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.trainer.advantages import Array, Mask, token_rewards
from onebase.trainer.algorithms.experience import Experience
from onebase.trainer.algorithms.stepper import NO_THRESHOLD, Metrics, PolicyStepper, training_sequence
from onebase.trainer.hyperparameters import ReinforcePpConfig
from onebase.trainer.stats import Stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session


class ReinforcePpStepper(PolicyStepper[ReinforcePpConfig]):
    """Makes REINFORCE++ steps with a session's policy."""

    name = "reinforce_pp"

    def __init__(
        self,
        session: Session,
        config: ReinforcePpConfig | None = None,
        *,
        reference: str = "base",
        adapter: str = "",
        rng: np.random.Generator | None = None,
    ) -> None:
        """Stands before the first step. See PolicyStepper."""
        super().__init__(session, config or ReinforcePpConfig(), reference=reference, adapter=adapter, rng=rng)

    @property
    def outputs(self) -> tuple[t.ScoreOutput, ...]:
        """What `update` needs of every completion besides its score."""
        return ("logprobs", "reference_logprobs")

    def update(self, experience: Experience) -> Stats:
        """Trains on a batch; returns statistics."""
        config, times, mask = self.config, Stopwatch(), experience.mask
        scores = experience.scores
        if config.score_clip is not None:
            scores = np.clip(scores, -config.score_clip, config.score_clip)
        reference = cast("Array", experience.reference_logprobs)
        rewards = token_rewards(scores, experience.logprobs, reference, mask, config.kl_coef).rewards
        advantages = normalized_returns(rewards, mask, config.gamma)
        passes = self._train(experience, advantages)
        optimize_step = times.lap()
        return self._stats(experience, passes, config.kl_coef) | {
            "reinforce_pp/advantages": advantages[mask],
            "time/reinforce_pp/optimize_step": optimize_step,
        }

    def _train(self, experience: Experience, advantages: Array) -> list[Metrics]:
        config = self.config
        loss = t.PpoLoss(
            cliprange=config.epsilon, cliprange_high=config.epsilon_high, vf_coef=0.0, ratio_threshold=NO_THRESHOLD
        )
        batch = [
            training_sequence(experience, index, old_logprobs=experience.logprobs, advantages=advantages)
            for index in range(len(experience.responses))
        ]

        def one_pass(chosen: NDArray[np.int64], version: int) -> Metrics:
            denominator = float(experience.lengths[chosen].sum() * config.gradient_accumulation_steps)
            return self._forward_backward([batch[index] for index in chosen], loss, version, denominator)

        return self._optimize(experience, config.num_iterations, one_pass)


def normalized_returns(rewards: Array, mask: Mask, gamma: float) -> Array:
    """Discounted sums of token rewards [B, T] from each token on, scaled to mean 0 and variance 1 over the mask."""
    returns = np.zeros_like(rewards)
    following = np.zeros(len(rewards))
    for column in reversed(range(rewards.shape[1])):
        following = rewards[:, column] * mask[:, column] + gamma * following
        returns[:, column] = following
    counted = returns[mask]
    normalized: Array = (returns - counted.mean()) / np.sqrt(max(counted.var(), 1e-8))
    return normalized * mask
