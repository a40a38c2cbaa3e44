"""Completions that are given, as token ids: the server, which has the tokenizer, tells those of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t

if TYPE_CHECKING:
    from onebase.client import Session


def token_ids(
    session: Session, prompts: Sequence[t.Content], completions: Sequence[t.Content], *, adapter: str, eos: int | None
) -> list[NDArray[np.integer[Any]]]:
    """Token ids of each completion.

    Args:
        session: of a policy.
        prompts: what each completion follows, as texts or token ids.
        completions: texts, or token ids.
        adapter: the policy; "" is the session's active adapter.
        eos: the token that is put behind completions which do not end with it; None leaves them as they are.

    Raises:
        ValueError: an empty completion.
    """
    for index, completion in enumerate(completions):
        if len(completion) == 0:
            raise ValueError(f"completions[{index}] is empty; there is nothing to learn from it")
    texts = [index for index, completion in enumerate(completions) if isinstance(completion, str)]
    tokens = [np.array([] if isinstance(completion, str) else completion, int) for completion in completions]
    if texts:
        asked = [t.Sequence(prompts[index], completions[index]) for index in texts]
        for index, answer in zip(texts, session.logprob(asked, adapter=adapter), strict=True):
            tokens[index] = np.asarray(answer.completion_tokens, int)
    if eos is None:
        return tokens
    return [row if row[-1] == eos else np.append(row, eos) for row in tokens]


def check_count(name: str, given: Sequence[object], batch_size: int) -> None:
    """Raises ValueError unless there are batch_size of them."""
    if len(given) != batch_size:
        raise ValueError(f"{name} holds {len(given)}, but batch_size is {batch_size}")
