"""Completions with everything that was known of them when they were drawn: what a policy learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onebase.client import types as t
from onebase.trainer.advantages import Array, Mask, pad


@dataclass(frozen=True)
class Experience:
    """B completions of at most T tokens. Arrays are [B, T], zero where a row is padded."""

    queries: Sequence[t.Content]
    """Prompts, as texts or token ids."""
    query_lengths: Sequence[int]
    """Their lengths in tokens."""
    responses: Sequence[t.Tokens]
    """Token ids of the completions."""
    scores: Array  # [B]
    """What each completion is worth."""
    mask: Mask
    """Which tokens count."""
    logprobs: Array
    """Under the policy that drew the completions."""
    reference_logprobs: Array | None
    """Under the reference, if the algorithm asks for them."""
    values: Array | None
    """Before each token, if the algorithm asks for them."""
    version: int
    """The policy's version that all of this is of."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that count, by completion [B]."""
        counts: NDArray[np.int64] = self.mask.sum(axis=1)
        return counts

    def row(self, numbers: Array, index: int) -> NDArray[np.float32]:
        """A completion's part of an array [B, T], without the padding, as it goes over the wire."""
        return numbers[index, : len(self.responses[index])].astype(np.float32)

    def row_mask(self, index: int) -> NDArray[np.bool_]:
        """Which tokens of a completion count."""
        return self.mask[index, : len(self.responses[index])]


def read_experience(
    queries: Sequence[t.Content],
    responses: Sequence[t.Tokens],
    scores: ArrayLike,
    numbers: Mapping[str, Sequence[NDArray[np.float32]]],
    response_masks: Sequence[ArrayLike] | None = None,
    *,
    query_lengths: Sequence[int],
    version: int,
) -> Experience:
    """Puts together what is known of a batch.

    Args:
        queries: each prompt, [B].
        responses: token ids of each completion, at least one each, [B].
        scores: what each completion is worth, [B].
        numbers: by name "logprobs", and maybe "reference_logprobs" and "values" of each completion, [B] of [t].
        response_masks: for each completion, which of its tokens count; all without it.
        query_lengths: each prompt's tokens, [B].
        version: the policy's version that the numbers are of.

    Raises:
        ValueError: lengths that do not fit together, or a score that is not finite.
    """
    mask = _masks(responses, response_masks)
    padded = {name: pad(rows, mask.shape[1]) for name, rows in numbers.items()}
    return Experience(
        queries=queries,
        query_lengths=query_lengths,
        responses=responses,
        scores=_scores(scores, len(queries)),
        mask=mask,
        logprobs=padded["logprobs"],
        reference_logprobs=padded.get("reference_logprobs"),
        values=padded.get("values"),
        version=version,
    )


def numbers_of(
    answers: Sequence[t.Score] | Sequence[t.Completion], outputs: Iterable[t.ScoreOutput]
) -> dict[str, list[NDArray[np.float32]]]:
    """The `outputs` that Score or Generate gave for each completion, by name.

    Raises:
        ValueError: one was not asked for.
    """
    return {output: [_given(answer, output) for answer in answers] for output in outputs}


def check_batch(queries: Sequence[t.Content], responses: Sequence[t.Tokens], batch_size: int) -> None:
    """Raises ValueError unless there are batch_size queries and as many responses, none of them empty."""
    for name, given in (("queries", queries), ("responses", responses)):
        if len(given) != batch_size:
            raise ValueError(f"{name} holds {len(given)}, but batch_size is {batch_size}")
    for index, response in enumerate(responses):
        if len(response) == 0:
            raise ValueError(f"responses[{index}] is empty; a response has at least one token")


def _scores(scores: ArrayLike, count: int) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (count,):
        raise ValueError(f"scores has shape {list(values.shape)}; it must hold one number for each of {count} queries")
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"scores[{index}] is {values[index]}; scores must be finite")
    return values


def _masks(responses: Sequence[t.Tokens], given: Sequence[ArrayLike] | None) -> Mask:
    """[B, T], True where a token is there and counts."""
    lengths = np.array([len(response) for response in responses])
    mask: Mask = np.arange(lengths.max()) < lengths[:, None]
    if given is None:
        return mask
    if len(given) != len(responses):
        raise ValueError(f"response_masks holds {len(given)}, but there are {len(responses)} responses")
    for row, counts in enumerate(given):
        flags = np.asarray(counts, dtype=bool)
        if flags.shape != (lengths[row],):
            raise ValueError(f"response_masks[{row}] has shape {list(flags.shape)}, its response {lengths[row]} tokens")
        if not flags.any():
            raise ValueError(f"response_masks[{row}] leaves out every token; its score would have no place")
        mask[row, : lengths[row]] = flags
    return mask


def _given(answer: t.Score | t.Completion, output: t.ScoreOutput) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] | None = getattr(answer, output)
    if numbers is None:
        raise ValueError(f"an answer lacks {output}; ask for it")
    return numbers
