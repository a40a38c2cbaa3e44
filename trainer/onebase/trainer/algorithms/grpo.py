"""One GRPO step on a batch (Shao et al. 2024, arXiv:2402.03300), as TRL's GRPOTrainer makes it.

A completion's advantage is its score within its group, the completions of one prompt; no critic. The KL penalty, if
any, is in the loss, token by token.

Deviations from TRL's defaults: the KL penalty is the paper's, which is TRL's with use_bias_correction_kl false; and the
order of every iteration over the batch is drawn anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.trainer.advantages import Array
from onebase.trainer.algorithms.experience import Experience
from onebase.trainer.algorithms.stepper import NO_THRESHOLD, Metrics, PolicyStepper, training_sequence
from onebase.trainer.hyperparameters import GrpoConfig
from onebase.trainer.stats import Stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

EPSILON = 1e-4
"""Added to the standard deviation that advantages are divided by."""


class GrpoStepper(PolicyStepper[GrpoConfig]):
    """Makes GRPO steps with a session's policy."""

    name = "grpo"

    def __init__(
        self,
        session: Session,
        config: GrpoConfig | None = None,
        *,
        max_new_tokens: int,
        reference: str = "base",
        adapter: str = "",
        rng: np.random.Generator | None = None,
    ) -> None:
        """Stands before the first step. `max_new_tokens` is what loss_type dr_grpo divides by. See PolicyStepper."""
        super().__init__(session, config or GrpoConfig(), reference=reference, adapter=adapter, rng=rng)
        self._max_new_tokens = max_new_tokens

    @property
    def outputs(self) -> tuple[t.ScoreOutput, ...]:
        """What `update` needs of every completion besides its score."""
        return ("logprobs", "reference_logprobs") if self.config.beta else ("logprobs",)

    def update(self, experience: Experience) -> Stats:
        """Trains on a batch whose groups stand together; returns statistics."""
        config, times = self.config, Stopwatch()
        groups = experience.scores.reshape(-1, config.num_generations)
        advantages = group_advantages(groups, config.scale_rewards).reshape(-1)
        passes = self._train(experience, advantages)
        optimize_step = times.lap()
        return self._stats(experience, passes, config.beta) | {
            "grpo/advantages": advantages,
            "grpo/frac_reward_zero_std": float((groups.std(axis=1) == 0).mean()),
            "time/grpo/optimize_step": optimize_step,
        }

    def _train(self, experience: Experience, advantages: Array) -> list[Metrics]:
        config = self.config
        loss = t.PpoLoss(
            cliprange=config.epsilon,
            cliprange_high=config.epsilon_high,
            vf_coef=0.0,
            ratio_threshold=NO_THRESHOLD,
            kl_coef=config.beta,
        )
        arrays = {"old_logprobs": experience.logprobs, "advantages": advantages[:, None] * experience.mask}
        if experience.reference_logprobs is not None:
            arrays["reference_logprobs"] = experience.reference_logprobs
        if config.loss_type == "grpo":
            arrays["weights"] = experience.mask / experience.lengths[:, None]
        batch = [training_sequence(experience, index, **arrays) for index in range(len(advantages))]

        def one_pass(chosen: NDArray[np.int64], version: int) -> Metrics:
            denominator = self._denominator(experience.lengths, chosen) * config.gradient_accumulation_steps
            return self._forward_backward([batch[index] for index in chosen], loss, version, denominator)

        return self._optimize(experience, config.num_iterations, one_pass)

    def _denominator(self, lengths: NDArray[np.int64], chosen: NDArray[np.int64]) -> float:
        """What divides the sum over the tokens of the chosen completions, given the lengths of all."""
        match self.config.loss_type:
            case "grpo":
                return float(len(chosen))
            case "bnpo":
                return float(lengths[chosen].sum())
            case "dapo":
                return float(lengths.sum()) * len(chosen) / len(lengths)
            case "dr_grpo":
                return float(len(chosen) * self._max_new_tokens)


def group_advantages(scores: Array, scale_rewards: str) -> Array:
    """Scores [groups, completions] less their group's mean, divided by what `scale_rewards` says."""
    advantages: Array = scores - scores.mean(axis=1, keepdims=True)
    if scale_rewards == "group":
        advantages /= scores.std(axis=1, ddof=1, keepdims=True) + EPSILON
    elif scale_rewards == "batch":
        advantages /= scores.std(ddof=1) + EPSILON
    return advantages
