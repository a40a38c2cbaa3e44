"""Rollouts: completions of prompts, and the texts around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from onebase.client import types as t
from onebase.trainer.config import GenerationConfig
from onebase.trainer.prompts import Prompt, PromptRow

if TYPE_CHECKING:
    from onebase.client import Session


@dataclass(frozen=True)
class Rollout:
    """A batch of prompts and one completion of each, in the same order."""

    rows: tuple[PromptRow, ...]
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

    def completed(self, scored: Sequence[t.Score]) -> list[t.Score]:
        """Scores with the policy's logprobs, values and version as the completions brought them."""
        return [
            replace(score, logprobs=completion.logprobs, values=completion.values, policy=completion.adapter)
            for score, completion in zip(scored, self.completions, strict=True)
        ]

    @property
    def tokens(self) -> int:
        """Number of tokens that were written."""
        return sum(len(completion.tokens) for completion in self.completions)


def roll_out(
    session: Session, rows: Sequence[PromptRow], generation: GenerationConfig, seed: int, *, numbers: bool = False
) -> Rollout:
    """Draws one completion of each prompt from the session's policy; the same seed draws the same ones.

    With `numbers`, each brings its logprobs and values.
    """
    sampling = t.SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        min_new_tokens=generation.min_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        stop=generation.stop,
        seed=seed,
    )
    prompts = [row.prompt for row in rows]
    completions = session.generate(prompts, sampling=sampling, logprobs=numbers, values=numbers)
    return Rollout(tuple(rows), tuple(completions))
