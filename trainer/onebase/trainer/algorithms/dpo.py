"""One DPO step on a batch of pairs (Rafailov et al. 2023, arXiv:2305.18290), as TRL's DPOTrainer makes it.

A pair is two completions of a prompt, of which the chosen one is to become the likelier, measured from the reference.
As for supervised fine-tuning, prompt and completion are tokenized apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from onebase.client import types as t
from onebase.trainer.algorithms.completions import CompletionStepper, check_count, token_ids
from onebase.trainer.hyperparameters import DpoConfig
from onebase.trainer.stats import Stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

REFERENCE: tuple[t.ScoreOutput, ...] = ("reference_logprobs",)


class DpoStepper(CompletionStepper[DpoConfig]):
    """Makes DPO steps with a session's policy."""

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
        super().__init__(session, config or DpoConfig(), eos=eos, adapter=adapter)
        self._reference = reference

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
        loss = t.DpoLoss(beta=config.beta, label_smoothing=config.label_smoothing)
        stats = self._train(rows, 2 * config.mini_batch_size, loss, float(config.batch_size))
        return stats | {"time/dpo/forward_pass": forward}

    def _rows(
        self, prompts: Sequence[t.Content], chosen: Sequence[t.Content], rejected: Sequence[t.Content]
    ) -> list[t.TrainingSequence]:
        """Chosen, then rejected, pair by pair, with the reference's logprobs."""
        both = [completion for pair in zip(chosen, rejected, strict=True) for completion in pair]
        twice = [prompt for prompt in prompts for _ in range(2)]
        tokens = token_ids(self._session, twice, both, adapter=self._adapter, eos=self._eos)
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
