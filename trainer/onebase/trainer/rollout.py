"""Rollouts: completions of prompts, and the texts around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from onebase.client import types as t
from onebase.trainer.config import GenerationConfig
from onebase.trainer.prompts import Prompt, PromptRow

if TYPE_CHECKING:
    from onebase.client import Session


@dataclass(frozen=True)
class Rollout:
    """Completions, those of a prompt side by side, and the prompt of each."""

    rows: tuple[PromptRow, ...]
    """The row of each completion's prompt."""
    completions: tuple[t.Completion, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts: texts, token ids or conversations."""
        return [row.prompt for row in self.rows]

    @property
    def texts(self) -> list[str]:
        """The completions as text."""
        return [completion.text for completion in self.completions]

    @property
    def responses(self) -> list[t.Tokens]:
        """The completions as token ids."""
        return [cast("t.Tokens", completion.tokens) for completion in self.completions]

    @property
    def sequences(self) -> list[t.Sequence]:
        """Prompts with the tokens that followed them."""
        return [t.Sequence(prompt, tokens) for prompt, tokens in zip(self.prompts, self.responses, strict=True)]

    @property
    def tokens(self) -> int:
        """Number of tokens that were written."""
        return sum(len(completion.tokens) for completion in self.completions)


def roll_out(
    session: Session,
    rows: Sequence[PromptRow],
    generation: GenerationConfig,
    seed: int,
    *,
    per_prompt: int = 1,
    outputs: Sequence[t.ScoreOutput] = (),
) -> Rollout:
    """Draws `per_prompt` completions of each prompt from the session's policy; the same seed draws the same ones.

    Each brings its `outputs`, of which there are logprobs and values.
    """
    sampling = t.SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        n=per_prompt,
        min_new_tokens=generation.min_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        stop=generation.stop,
        seed=seed,
    )
    prompts = [row.prompt for row in rows]
    completions = session.generate(
        prompts, sampling=sampling, logprobs="logprobs" in outputs, values="values" in outputs
    )
    return Rollout(tuple(row for row in rows for _ in range(per_prompt)), tuple(completions))
