"""From hidden states to numbers: logprobs and entropies without a full logits tensor, values, scores.

Logits exist for at most CHUNK positions at a time and are reduced in float32: in bfloat16 a log-softmax errs by .06.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onebase.server.engine.adapters import Head
from onebase.server.engine.batch import MIN_ROWS
from onebase.server.engine.precision import wide_linear

MIN_COLUMNS = 16
"""Fewest columns of a head's product."""

CHUNK = 128
"""Positions whose logits exist at once."""


@dataclass(frozen=True)
class LmHead:
    """The base's output embedding and what the architecture does to its logits."""

    embedding: nn.Module
    finish: Callable[[torch.Tensor], torch.Tensor]
    wide: bool = False  # products in float32 (see `precision`)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, hidden] to float32 [M, vocabulary]; M rows round the same for any M."""
        rows = hidden.shape[0]
        if rows < MIN_ROWS:
            hidden = nn.functional.pad(hidden, (0, 0, 0, MIN_ROWS - rows))
        return self.finish(self._product(hidden)[:rows].float())

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        embedding = self.embedding
        if self.wide and isinstance(embedding, nn.Linear):
            logits = wide_linear(hidden, embedding.weight)
            return logits if embedding.bias is None else logits + embedding.bias
        narrow: torch.Tensor = embedding(hidden)
        return narrow


def token_logprobs(
    head: LmHead, hidden: torch.Tensor, targets: torch.Tensor, *, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logprobs of chosen tokens, and entropies in nats.

    Args:
        head: the output embedding.
        hidden: [M, hidden], the states before each token.
        targets: [M], the tokens.
        entropy: whether to compute entropies too.

    Returns:
        float32 [M], and float32 [M] without gradients or None.
    """
    logprobs: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    recompute = torch.is_grad_enabled() and hidden.shape[0] > CHUNK  # logits of one chunk alone may be kept
    for part, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
        if recompute:
            found = checkpoint(_chunk_logprobs, head, part, wanted, entropy, use_reentrant=False)
        else:
            found = _chunk_logprobs(head, part, wanted, entropy)
        logprobs.append(found[0])
        entropies.append(found[1])
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _chunk_logprobs(
    head: LmHead, hidden: torch.Tensor, targets: torch.Tensor, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = head.logits(hidden)
    total = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - total
    if not entropy:
        return logprobs, total.detach()
    with torch.no_grad():
        return logprobs, total - (torch.softmax(logits, dim=-1) * logits).sum(-1)


def linear_head(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """A value or score head in its own precision: [M, hidden] to [M, labels]; the same for any M."""
    rows, labels = hidden.shape[0], head.weight.shape[0]
    if rows < MIN_ROWS:
        hidden = nn.functional.pad(hidden, (0, 0, 0, MIN_ROWS - rows))
    # a product with a single column is one with a vector, and rounds by the number of rows
    weight = nn.functional.pad(head.weight, (0, 0, 0, max(0, MIN_COLUMNS - labels)))
    found = nn.functional.linear(hidden.to(weight.dtype), weight)[:rows, :labels]
    return found if head.bias is None else found + head.bias


def logits_finish(config: object) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an architecture does to its logits after the output embedding, read off its configuration.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma 2 soft-caps. Whether this is all
    that a model does is proven when it is loaded.
    """
    divide = float(getattr(config, "logits_scaling", None) or 1.0)
    multiply = float(getattr(config, "logit_scale", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: torch.Tensor) -> torch.Tensor:
        if divide != 1.0:
            logits = logits / divide
        if multiply != 1.0:
            logits = logits * multiply
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return finish
