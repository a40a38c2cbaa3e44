"""From hidden states to numbers: logprobs and entropies without a full logits tensor, values, scores.

On the device logits exist for at most CHUNK positions at a time, and are reduced in float32: in bfloat16 a log-softmax
errs by .06.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onebase.server.engine.adapters import Head
from onebase.server.engine.batch import MIN_ROWS
from onebase.server.engine.precision import wide_linear

MIN_COLUMNS = 16
"""Fewest columns of a head's product."""

CHUNK = 64
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
    head: LmHead, hidden: torch.Tensor, targets: torch.Tensor, *, entropy: bool, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logprobs of chosen tokens, and entropies in nats.

    Args:
        head: the output embedding.
        hidden: [M, hidden], the states before each token.
        targets: [M], the tokens.
        entropy: whether to compute entropies too.
        entropy_gradient: whether gradients shall flow through the entropies too, where they flow at all.

    Returns:
        float32 [M], and float32 [M] or None.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        trained, entropies = _TrainedLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, targets, head, entropy_gradient
        )
        return trained, entropies if entropy else None
    parts = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    pieces = [_chunk_logprobs(head.logits(part), wanted, entropy=entropy) for part, wanted in parts]
    logprobs = torch.cat([logprobs for logprobs, _ in pieces])
    return logprobs, torch.cat([entropies for _, entropies in pieces]) if entropy else None


def all_logits(head: LmHead, hidden: torch.Tensor) -> torch.Tensor:
    """Logits, float32 [M, vocabulary] on the host, of states [M, hidden]; CHUNK positions at a time on the device."""
    return torch.cat([head.logits(part).cpu() for part in torch.split(hidden, CHUNK)])


def _chunk_logprobs(logits: torch.Tensor, targets: torch.Tensor, *, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs [M] of the targets, and entropies [M] (something else where they are not asked for)."""
    total = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - total
    if not entropy:
        return logprobs, total
    return logprobs, total - ((logits - total[:, None]).exp_().mul_(logits)).sum(-1)


class _TrainedLogprobs(torch.autograd.Function):
    """Logprobs and entropies whose backward pass needs no logits.

    A logprob's derivative by its own state, dlogits/dstate · (onehot - probabilities), is made while the chunk's logits
    are there. It is [M, hidden]; so logits of one chunk alone exist at any time, and none is computed twice. That of
    the entropy, dlogits/dstate · -probabilities · (logprobs + entropy), is made beside it only where it is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: LmHead, by_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = [], []
        derivatives: tuple[list[torch.Tensor], ...] = ([], []) if by_entropy else ([],)
        for part, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            with torch.enable_grad():
                states = part.detach().requires_grad_()
                logits = head.logits(states)
            fixed = logits.detach()
            part_logprobs, part_entropy = _chunk_logprobs(fixed, wanted, entropy=True)
            logprobs.append(part_logprobs)
            entropies.append(part_entropy)
            if by_entropy:
                slope = _entropy_slope(fixed, part_entropy)
                derivatives[1].append(torch.autograd.grad(logits, states, slope, retain_graph=True)[0])
            slope = torch.softmax(fixed, dim=-1).neg_()
            slope[torch.arange(len(wanted)), wanted] += 1.0
            derivatives[0].append(torch.autograd.grad(logits, states, slope)[0])
        ctx.save_for_backward(*map(torch.cat, derivatives))
        entropy = torch.cat(entropies)
        if not by_entropy:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *by: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # without an entropy's derivative there is one saved tensor for the two outputs
        parts = [outer[:, None] * inner for outer, inner in zip(by, ctx.saved_tensors, strict=False)]
        return sum(parts[1:], parts[0]).to(ctx.saved_tensors[0].dtype), None, None, None


def _entropy_slope(logits: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """d entropy / d logits, [M, vocabulary]: -p · (log p + entropy)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.exp().mul_((logprobs + entropy[:, None]).neg_())


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
