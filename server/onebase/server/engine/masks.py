"""Does a model's own attention mask say what ours says, also far beyond the sequences of a proof?

A window of 4,096 tokens cannot be seen in 40. But transformers makes masks from a function of places, and asks the
mask interface of its attention to lay it out. Here that interface lays it out for a few places up to the end of the
context, and the attention compares what it gets with the causal window that it would apply. Nothing is attended.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from onebase.server.engine.attention import UnsupportedAttention

NAME = "onebase_masks"
"""The name under which transformers knows this attention and its masks."""

POINTS = 24
"""Most places that are looked at, from the first of a context to its last, ever farther from each other."""


@torch.no_grad()
def check(model: PreTrainedModel, max_context: int, device: torch.device | str) -> None:
    """Runs a few tokens through the model, and leaves it with an attention that only compares.

    Raises:
        UnsupportedAttention: a layer masks otherwise than by the causal window that it tells its attention.
    """
    points = sorted({round(max_context ** (i / (POINTS - 1))) - 1 for i in range(POINTS)})
    places = torch.tensor(points, device=device)
    AttentionMaskInterface.register(NAME, _layout(places))
    AttentionInterface.register(NAME, _comparison(places))
    model.set_attn_implementation(NAME)
    model.base_model(input_ids=torch.zeros(1, len(points), dtype=torch.long, device=device), use_cache=False)


def _layout(places: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The mask interface: whether a query at each place [P] sees the key at each place, [1, 1, P, P]."""

    def layout(*_: object, mask_function: Callable[..., torch.Tensor], **__: object) -> torch.Tensor:
        first = torch.zeros_like(places)
        seen = mask_function(first[:1, None], first[:1, None], places[:, None], places[None])
        return seen.expand(1, 1, len(places), len(places))

    return layout


def _comparison(places: torch.Tensor) -> Callable[..., tuple[torch.Tensor, None]]:
    """The attention: it compares, and returns nothing of worth."""

    def comparison(
        module: nn.Module,
        query: torch.Tensor,  # [1, heads, P, head_dim]
        key: torch.Tensor,  # noqa: ARG001
        value: torch.Tensor,  # [1, kv_heads, P, head_dim]
        attention_mask: torch.Tensor | None,
        *_: object,
        sliding_window: int | None = None,
        **__: object,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None:
            far = places[:, None] - places[None]
            ours = far >= 0 if sliding_window is None else (far >= 0) & (far < sliding_window)
            wrong = (attention_mask[0, 0] != ours).nonzero().tolist()
            if wrong:
                at, other = (int(places[i]) for i in wrong[-1])
                raise UnsupportedAttention(
                    f"layer {module.layer_idx}'s mask is not the causal window that it tells its attention: they "
                    f"disagree on whether token {at} sees token {other}"
                )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    return comparison
