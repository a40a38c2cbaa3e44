"""One step of supervised fine-tuning on a batch: the mean negative logprob of given completions.

As TRL's SFTTrainer computes it on prompts with completions: prompts are read but not learned, and the loss is the mean
over all tokens of the batch, however it is cut into passes. Deviation: prompt and completion are tokenized apart, as
they are when a policy writes; where a tokenizer joins letters across the seam, TRL's tokens are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from onebase.client import types as t
from onebase.trainer.algorithms.completions import CompletionStepper, check_count, token_ids
from onebase.trainer.hyperparameters import SftConfig
from onebase.trainer.stats import Stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session


class SftStepper(CompletionStepper[SftConfig]):
    """Makes steps of supervised fine-tuning with a session's policy."""

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
        super().__init__(session, config or SftConfig(), eos=eos, adapter=adapter)

    def step(self, prompts: Sequence[t.Content], completions: Sequence[t.Content]) -> Stats:
        """Trains on completions of prompts, batch_size of each; returns statistics.

        Raises:
            ValueError: another number of them, or an empty completion.
        """
        config, times = self.config, Stopwatch()
        rows = self._rows(prompts, completions)
        tokenize = times.lap()
        total = sum(len(row.completion) for row in rows)
        stats = self._train(rows, config.mini_batch_size, t.CrossEntropyLoss(), float(total))
        return stats | {"time/sft/tokenize": tokenize}

    def _rows(self, prompts: Sequence[t.Content], completions: Sequence[t.Content]) -> list[t.TrainingSequence]:
        check_count("prompts", prompts, self.config.batch_size)
        check_count("completions", completions, self.config.batch_size)
        tokens = token_ids(self._session, prompts, completions, adapter=self._adapter, eos=self._eos)
        # A text goes over the wire as it is, with the tokenizer's own special tokens in front.
        return [t.TrainingSequence(cast("t.Tokens", prompt), row) for prompt, row in zip(prompts, tokens, strict=True)]
