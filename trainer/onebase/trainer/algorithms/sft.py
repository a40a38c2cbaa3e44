"""One step of supervised fine-tuning on a batch: the mean negative logprob of given completions.

As TRL's SFTTrainer computes it on prompts with completions: prompts are read but not learned, and the loss is the mean
over all tokens of the batch, however it is cut into passes. Deviation: prompt and completion are tokenized apart, as
they are when a policy writes; where a tokenizer joins letters across the seam, TRL's tokens are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from onebase.client import types as t
from onebase.trainer.algorithms.completions import check_count, token_ids
from onebase.trainer.algorithms.gradients import Gradients
from onebase.trainer.hyperparameters import SftConfig
from onebase.trainer.stats import Stats, length_stats, pass_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session


class SftStepper:
    """Makes steps of supervised fine-tuning with a session's policy.

    Attributes:
        config: the settings.
        version: the policy's version after the last step; None before the first.
    """

    name = "sft"

    def __init__(
        self, session: Session, config: SftConfig | None = None, *, eos: int | None, adapter: str = ""
    ) -> None:
        """Stands before the first step.

        Args:
            session: holds the lease of the policy.
            config: the settings.
            eos: id of the end-of-sequence token; None where there is none to append.
            adapter: the policy; "" is the session's active adapter.
        """
        self.config = config or SftConfig()
        self.version: int | None = None
        self._session = session
        self._eos = eos
        self._adapter = adapter
        self._gradients = Gradients(session, adapter)

    def state(self) -> dict[str, Any]:
        """What lies between two steps besides the weights: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""

    def step(self, prompts: Sequence[t.Content], completions: Sequence[t.Content]) -> Stats:
        """Trains on completions of prompts, batch_size of each; returns statistics.

        Raises:
            ValueError: another number of them, or an empty completion.
        """
        config, times = self.config, Stopwatch()
        rows = self._rows(prompts, completions)
        tokenize = times.lap()
        total = sum(len(row.completion) for row in rows)
        passes = []
        for start in range(0, len(rows), config.mini_batch_size):
            result = self._gradients.add(
                rows[start : start + config.mini_batch_size],
                t.CrossEntropyLoss(),
                denominator=float(total),
                expected_version=self.version,
            )
            passes.append(result.metrics)
        stepped = self._gradients.step(
            config.learning_rate, config.max_grad_norm, expected_version=result.adapter.version
        )
        self.version = stepped.adapter.version
        return (
            pass_stats("sft", passes)
            | {
                "sft/loss/total": float(sum(metrics["loss/total"] for metrics in passes)),  # each is a part of the mean
                "sft/grad_norm": stepped.grad_norm,
                "sft/learning_rate": config.learning_rate,
                "time/sft/tokenize": tokenize,
                "time/sft/optimize_step": times.lap(),
            }
            | length_stats([], [len(row.completion) for row in rows])
        )

    def _rows(self, prompts: Sequence[t.Content], completions: Sequence[t.Content]) -> list[t.TrainingSequence]:
        check_count("prompts", prompts, self.config.batch_size)
        check_count("completions", completions, self.config.batch_size)
        eos = self._eos if self.config.append_eos else None
        tokens = token_ids(self._session, prompts, completions, adapter=self._adapter, eos=eos)
        # A text goes over the wire as it is, with the tokenizer's own special tokens in front.
        return [t.TrainingSequence(cast("t.Tokens", prompt), row) for prompt, row in zip(prompts, tokens, strict=True)]
