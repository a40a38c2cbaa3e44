"""What the algorithms that learn from scored completions share: scoring a batch, going through it in minibatches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onebase.client import types as t
from onebase.trainer.algorithms.experience import Experience, check_batch, numbers_of, read_experience
from onebase.trainer.algorithms.gradients import Gradients
from onebase.trainer.hyperparameters import OnPolicy
from onebase.trainer.stats import Stats, kl_stats, length_stats, pass_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

Config = TypeVar("Config", bound=OnPolicy)

Metrics: TypeAlias = Mapping[str, float]
"""What one forward and backward pass gave."""

OnePass: TypeAlias = Callable[[NDArray[np.int64], int], Metrics]
"""Adds the gradients of the completions of these indexes, at this version of the policy."""

NO_THRESHOLD = 1e30
"""A ratio_threshold that nothing reaches: only TRL's PPO leaves out a pass for its mean ratio."""


class PolicyStepper(ABC, Generic[Config]):
    """Makes steps with a session's policy.

    Attributes:
        config: the algorithm's settings.
        version: the policy's version after the last step; None before the first.
    """

    name: ClassVar[str]
    """The algorithm's name, which its statistics begin with."""

    def __init__(
        self,
        session: Session,
        config: Config,
        *,
        reference: str = "base",
        adapter: str = "",
        rng: np.random.Generator | None = None,
    ) -> None:
        """Stands before the first step.

        Args:
            session: holds the lease of the policy.
            config: the algorithm's settings.
            reference: "base" or a frozen adapter.
            adapter: the policy; "" is the session's active adapter.
            rng: draws the minibatches; without one, a generator of seed 0.
        """
        self.config = config
        self.version: int | None = None
        self._session = session
        self._reference = reference
        self._adapter = adapter
        self._rng = rng or np.random.default_rng(0)
        self._critic = ""
        self._gradients = Gradients(session, adapter)

    @property
    @abstractmethod
    def outputs(self) -> tuple[t.ScoreOutput, ...]:
        """What `update` needs of every completion besides its score."""

    @abstractmethod
    def update(self, experience: Experience) -> Stats:
        """Trains on a batch of batch_size completions; returns statistics."""

    def state(self) -> dict[str, Any]:
        """What lies between two steps besides the weights: plain values for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""

    def step(
        self,
        queries: Sequence[t.Tokens],
        responses: Sequence[t.Tokens],
        scores: ArrayLike,
        response_masks: Sequence[ArrayLike] | None = None,
    ) -> Stats:
        """Scores a batch under the policy and the reference, and trains on it.

        Args:
            queries: token ids of each query, batch_size of them; a group's queries stand together.
            responses: token ids of each response, at least one each.
            scores: the reward of each response, [batch_size].
            response_masks: for each response, which of its tokens count; all without it.

        Returns:
            Statistics by name.

        Raises:
            ValueError: lengths that do not fit together, or a score that is not finite.
        """
        times = Stopwatch()
        check_batch(queries, responses, self.config.batch_size)
        scored = self._score(queries, responses)
        forward = times.lap()
        experience = read_experience(
            queries,
            responses,
            scores,
            numbers_of(scored, self.outputs),
            response_masks,
            query_lengths=[len(query) for query in queries],
            version=scored[0].policy.version,
        )
        stats = self.update(experience)
        total = forward + times.lap()
        return stats | {f"time/{self.name}/forward_pass": forward, f"time/{self.name}/total": total}

    def _score(self, queries: Sequence[t.Tokens], responses: Sequence[t.Tokens]) -> Sequence[t.Score]:
        return self._session.score(
            [t.Sequence(query, response) for query, response in zip(queries, responses, strict=True)],
            rewards=None,
            reference=self._reference,
            outputs=self.outputs,
            ppo_adapter_name=self._adapter,
            critic=self._critic,
        )

    # ------------------------------------------------------------------------------------------- for the algorithms

    def _optimize(
        self, experience: Experience, epochs: int, one_pass: OnePass, *, enough: Callable[[Metrics], bool] | None = None
    ) -> list[Metrics]:
        """Goes through the batch `epochs` times in minibatches; returns the metrics of every pass.

        Args:
            experience: the batch.
            epochs: how often.
            one_pass: adds a minibatch's gradients.
            enough: asked of an epoch's last pass; True leaves out the remaining epochs.
        """
        config, version = self.config, experience.version
        passes: list[Metrics] = []
        for _ in range(epochs):
            order = self._rng.permutation(len(experience.responses))
            for start in range(0, len(order), config.mini_batch_size):
                passes.append(one_pass(order[start : start + config.mini_batch_size], version))
                if len(passes) % config.gradient_accumulation_steps == 0:
                    version = self._optim_step(version)
            if enough is not None and enough(passes[-1]):
                break
        self.version = version
        return passes

    def _forward_backward(
        self, minibatch: Sequence[t.TrainingSequence], loss: t.Loss, version: int, denominator: float | None
    ) -> Metrics:
        """One pass; its losses come back undivided by gradient_accumulation_steps, its entropy as the tokens' mean."""
        result = self._gradients.add(minibatch, loss, denominator=denominator, expected_version=version)
        return self._undivided(result.metrics)

    def _undivided(self, metrics: Metrics) -> Metrics:
        accumulated = self.config.gradient_accumulation_steps
        return {name: value * accumulated if name.startswith("loss/") else value for name, value in metrics.items()}

    def _optim_step(self, version: int) -> int:
        config = self.config
        stepped = self._gradients.step(config.learning_rate, config.max_grad_norm, expected_version=version)
        return stepped.adapter.version

    def _stats(self, experience: Experience, passes: Sequence[Metrics], kl_coef: float) -> Stats:
        """What all algorithms tell of a step."""
        stats = pass_stats(self.name, passes)
        stats |= length_stats(experience.query_lengths, [len(response) for response in experience.responses])
        if experience.reference_logprobs is not None:
            kls = (experience.logprobs - experience.reference_logprobs) * experience.mask
            stats |= kl_stats(kls, kl_coef)
        stats[f"{self.name}/learning_rate"] = self.config.learning_rate
        return stats


def training_sequence(experience: Experience, index: int, **arrays: NDArray[np.float64]) -> t.TrainingSequence:
    """A completion to train on with its rows of `arrays`, each [B, T], and its mask."""
    return t.TrainingSequence(
        # A text goes over the wire as it is, so that the server tokenizes it as it did when the completion was drawn.
        prompt=cast("t.Tokens", experience.queries[index]),
        completion=experience.responses[index],
        mask=experience.row_mask(index),
        **{name: experience.row(numbers, index) for name, numbers in arrays.items()},
    )
