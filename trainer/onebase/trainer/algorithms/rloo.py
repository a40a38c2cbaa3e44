"""One RLOO step on a batch (Ahmadian et al. 2024, arXiv:2402.14740), as TRL's RLOOTrainer makes it.

REINFORCE on whole completions: the KL penalty is in the reward, the baseline is the mean reward of the other
completions of the prompt, and what is clipped is the ratio of a completion's probabilities, not of a token's. The
server has no such loss, so its derivatives are made here (CustomLoss). Deviation from TRL: the order of every iteration
over the batch is drawn anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.trainer.advantages import Array, pad
from onebase.trainer.algorithms.experience import Experience
from onebase.trainer.algorithms.stepper import Metrics, PolicyStepper, training_sequence
from onebase.trainer.hyperparameters import RlooConfig
from onebase.trainer.stats import Stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

EPSILON = 1e-4
"""Added to the standard deviation that advantages are divided by."""


class RlooStepper(PolicyStepper[RlooConfig]):
    """Makes RLOO steps with a session's policy."""

    name = "rloo"

    def __init__(
        self,
        session: Session,
        config: RlooConfig | None = None,
        *,
        reference: str = "base",
        adapter: str = "",
        rng: np.random.Generator | None = None,
    ) -> None:
        """Stands before the first step. See PolicyStepper."""
        super().__init__(session, config or RlooConfig(), reference=reference, adapter=adapter, rng=rng)

    @property
    def outputs(self) -> tuple[t.ScoreOutput, ...]:
        """What `update` needs of every completion besides its score."""
        return ("logprobs", "reference_logprobs") if self.config.beta else ("logprobs",)

    def update(self, experience: Experience) -> Stats:
        """Trains on a batch whose groups stand together; returns statistics."""
        config, times = self.config, Stopwatch()
        rewards = experience.scores
        if experience.reference_logprobs is not None:
            kls = (experience.logprobs - experience.reference_logprobs) * experience.mask
            rewards = rewards - config.beta * kls.sum(axis=1)
        advantages = leave_one_out(rewards.reshape(-1, config.num_generations)).reshape(-1)
        if config.normalize_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + EPSILON)
        passes = self._train(experience, advantages)
        optimize_step = times.lap()
        return self._stats(experience, passes, config.beta) | {
            "rloo/advantages": advantages,
            "time/rloo/optimize_step": optimize_step,
        }

    def _train(self, experience: Experience, advantages: Array) -> list[Metrics]:
        def one_pass(chosen: NDArray[np.int64], version: int) -> Metrics:
            drift = self._current(experience, chosen, version) - experience.logprobs[chosen]
            ratios = np.exp((drift * experience.mask[chosen]).sum(axis=1))
            return self._clipped(experience, chosen, version, ratios, advantages[chosen])

        return self._optimize(experience, self.config.num_iterations, one_pass)

    def _current(self, experience: Experience, chosen: NDArray[np.int64], version: int) -> Array:
        """Logprobs of the chosen completions at this version of the policy, [M, T]."""
        if version == experience.version:
            return experience.logprobs[chosen]
        sequences = [t.Sequence(experience.queries[index], experience.responses[index]) for index in chosen]
        found = self._session.logprob(sequences, adapter=self._adapter, adapter_version=version)
        return pad([one.logprobs for one in found], experience.mask.shape[1])

    def _clipped(
        self,
        experience: Experience,
        chosen: NDArray[np.int64],
        version: int,
        ratios: Array,
        advantages: Array,
    ) -> Metrics:
        """Adds the gradients of mean max(-A·ratio, -A·clip(ratio, 1 ± epsilon)); ratios and advantages are [M]."""
        config = self.config
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        losses, clipped = -advantages * ratios, -advantages * np.clip(ratios, 1 - config.epsilon, 1 + high)
        # d loss / d logprob is the same for all tokens of a completion: d ratio / d logprob is the ratio.
        derivatives = np.where(losses >= clipped, losses, 0.0) / (len(chosen) * config.gradient_accumulation_steps)
        gradients = np.zeros_like(experience.logprobs)
        gradients[chosen] = derivatives[:, None] * experience.mask[chosen]
        minibatch = [training_sequence(experience, index, logprob_gradients=gradients) for index in chosen]
        metrics = self._forward_backward(minibatch, t.CustomLoss(), version, None)
        return {
            "policy/entropy": metrics["policy/entropy"],
            "loss/policy": float(np.maximum(losses, clipped).mean()),
            "policy/ratio": float(ratios.mean()),
            "policy/clipfrac": float((clipped > losses).mean()),
        }


def leave_one_out(rewards: Array) -> Array:
    """Rewards [groups, completions] less the mean of the others of their group."""
    others = rewards.sum(axis=1, keepdims=True) - rewards
    advantages: Array = rewards - others / (rewards.shape[1] - 1)
    return advantages
