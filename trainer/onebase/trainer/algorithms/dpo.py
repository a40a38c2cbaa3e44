"""One DPO step on a batch of pairs (Rafailov et al. 2023, arXiv:2305.18290), as TRL's DPOTrainer makes it.

A pair is two completions of a prompt, of which the chosen one is to become the likelier, measured from the reference.
As for supervised fine-tuning, prompt and completion are tokenized apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from onebase.client import types as t
from onebase.trainer.algorithms.completions import check_count, token_ids
from onebase.trainer.algorithms.gradients import Gradients
from onebase.trainer.hyperparameters import DpoConfig
from onebase.trainer.stats import Stats, length_stats, pass_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

REFERENCE: tuple[t.ScoreOutput, ...] = ("reference_logprobs",)


class DpoStepper:
    """Makes DPO steps with a session's policy.

    Attributes:
        config: the settings.
        version: the policy's version after the last step; None before the first.
    """

    name = "dpo"

    def __init__(
        self,
        session: Session,
        config: DpoConfig | None = None,
        *,
        eos: int | None,
        reference: str = "base",
        adapter: str = "",
    ) -> None:
        """Stands before the first step.

        Args:
            session: holds the lease of the policy.
            config: the settings.
            eos: id of the end-of-sequence token; None where there is none to append.
            reference: "base" or a frozen adapter.
            adapter: the policy; "" is the session's active adapter.
        """
        self.config = config or DpoConfig()
        self.version: int | None = None
        self._session = session
        self._eos = eos
        self._reference = reference
        self._adapter = adapter
        self._gradients = Gradients(session, adapter)

    def state(self) -> dict[str, Any]:
        """What lies between two steps besides the weights: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""

    def step(self, prompts: Sequence[t.Content], chosen: Sequence[t.Content], rejected: Sequence[t.Content]) -> Stats:
        """Trains on pairs of completions, batch_size of them; returns statistics.

        Raises:
            ValueError: another number of them, or an empty completion.
        """
        config, times = self.config, Stopwatch()
        for name, given in (("prompts", prompts), ("chosen", chosen), ("rejected", rejected)):
            check_count(name, given, config.batch_size)
        rows = self._rows(prompts, chosen, rejected)
        forward = times.lap()
        passes = []
        for start in range(0, len(rows), 2 * config.mini_batch_size):
            result = self._gradients.add(
                rows[start : start + 2 * config.mini_batch_size],
                t.DpoLoss(beta=config.beta, label_smoothing=config.label_smoothing),
                denominator=float(config.batch_size),
                expected_version=self.version,
            )
            passes.append(result.metrics)
        stepped = self._gradients.step(
            config.learning_rate, config.max_grad_norm, expected_version=result.adapter.version
        )
        self.version = stepped.adapter.version
        return (
            pass_stats("dpo", passes)
            | {
                "dpo/loss/total": float(sum(metrics["loss/total"] for metrics in passes)),  # each is a part of the mean
                "dpo/grad_norm": stepped.grad_norm,
                "dpo/learning_rate": config.learning_rate,
                "time/dpo/forward_pass": forward,
                "time/dpo/optimize_step": times.lap(),
            }
            | length_stats([], [len(row.completion) for row in rows])
        )

    def _rows(
        self, prompts: Sequence[t.Content], chosen: Sequence[t.Content], rejected: Sequence[t.Content]
    ) -> list[t.TrainingSequence]:
        """Chosen, then rejected, pair by pair, with the reference's logprobs."""
        both = [completion for pair in zip(chosen, rejected, strict=True) for completion in pair]
        twice = [prompt for prompt in prompts for _ in range(2)]
        eos = self._eos if self.config.append_eos else None
        tokens = token_ids(self._session, twice, both, adapter=self._adapter, eos=eos)
        scored = self._session.score(
            [t.Sequence(prompt, row) for prompt, row in zip(twice, tokens, strict=True)],
            rewards=None,
            reference=self._reference,
            outputs=REFERENCE,
            ppo_adapter_name=self._adapter,
        )
        return [
            t.TrainingSequence(cast("t.Tokens", prompt), row, reference_logprobs=score.reference_logprobs)
            for prompt, row, score in zip(twice, tokens, scored, strict=True)
        ]
