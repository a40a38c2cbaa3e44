"""Attention over a flat batch, for every architecture that asks transformers' AttentionInterface.

Three kinds of rows: fresh ones attend to themselves, single tokens to their slot in the KV cache, and chunks to their
slot and themselves. Nothing attends across rows. Lengths are padded to KV_BLOCK and a lone query is repeated to
MIN_ROWS, so that a token's numbers are the same whether it was prefilled, decoded or scored, and whoever else is in
the batch (bit for bit up to 192 tokens on a CPU; beyond, to the last bit or two).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

from onebase.server.engine.batch import MIN_ROWS, DecodeBatch, Route, Row, padded
from onebase.server.engine.kv import KVCache

NAME = "onebase"
"""The name under which transformers knows this attention."""

_HARMLESS = {"position_ids", "use_cache", "is_causal", "cache_position", "output_attentions", "position_embeddings"}


class UnsupportedAttention(Exception):
    """The model asks for something that this attention does not do."""


def attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, N, head_dim]
    key: torch.Tensor,  # [1, kv_heads, N, head_dim]
    value: torch.Tensor,  # [1, kv_heads, N, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attends each row of the current batch to itself and its past.

    Returns:
        [1, N, heads, head_dim], as transformers wants it, and no weights.

    Raises:
        UnsupportedAttention: for soft-capping, sinks and other things that would change the numbers.
    """
    strange = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if strange or dropout or attention_mask is not None:
        raise UnsupportedAttention(f"attention with {', '.join(strange) or 'dropout or a mask of its own'}")
    route: Route = module.onebase_route  # type: ignore[assignment]
    batch = route.batch
    if batch is None:
        raise UnsupportedAttention("attention outside an engine step")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = query[0], key[0], value[0]
    parts: list[tuple[Row, torch.Tensor]] = []
    for row in batch.fresh:
        part = slice(row.start, row.stop)
        if row.slot is not None:
            _cache(route).write(layer, row.slot, 0, k[:, part], v[:, part])
        parts.append((row, _fresh(q[:, part], k[:, part], v[:, part], scale, sliding_window)))
    for row in batch.chunks:
        parts.append((row, _chunk(route, layer, row, q, k, v, scale, sliding_window)))
    if batch.decode is None and sum(len(row.tokens) for row, _ in parts) == batch.size:
        parts.sort(key=lambda pair: pair[0].start)
        out = parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts], dim=1)
    else:
        out = torch.zeros_like(q)
        for row, attended in parts:
            out[:, row.start : row.stop] = attended
        if batch.decode is not None:
            out[:, batch.decode.index] = _decode(_cache(route), layer, batch.decode, q, k, v, scale, sliding_window)
    return out.transpose(0, 1).unsqueeze(0), None


def _cache(route: Route) -> KVCache:
    if route.kv is None:
        raise UnsupportedAttention("a row with a slot, and no cache")
    return route.kv


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _fresh(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """[heads, t, head_dim] of one row that begins its sequence."""
    length = q.shape[1]
    fill = padded(length) - length
    if fill:
        q, k, v = (nn.functional.pad(t, (0, 0, 0, fill)) for t in (q, k, v))
    mask = None
    if window is not None and length > window:
        place = torch.arange(length + fill, device=q.device)
        mask = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)
    return _sdpa(q[None], k[None], v[None], scale, mask, mask is None)[0, :, :length]


def _chunk(
    route: Route,
    layer: int,
    row: Row,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[heads, t, head_dim] of several tokens that go on with a cached sequence."""
    cache, part, slot = _cache(route), slice(row.start, row.stop), row.slot
    if slot is None:
        raise UnsupportedAttention("a row with a past, and no slot")
    cache.write(layer, slot, row.past, k[:, part], v[:, part])
    keys, values = cache.layer(layer)
    length = row.past + len(row.tokens)
    span = padded(length)
    place = torch.arange(span, device=q.device)
    at = torch.arange(row.past, length, device=q.device)[:, None]
    mask = place[None] <= at
    if window is not None:
        mask &= place[None] > at - window
    fill = max(0, MIN_ROWS - len(row.tokens))
    queries = nn.functional.pad(q[:, part], (0, 0, 0, fill))
    mask = nn.functional.pad(mask, (0, 0, 0, fill), value=True)
    out = _sdpa(queries[None], keys[slot : slot + 1, :, :span], values[slot : slot + 1, :, :span], scale, mask, False)
    return out[0, :, : len(row.tokens)]


def _decode(
    cache: KVCache,
    layer: int,
    decode: DecodeBatch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[heads, B, head_dim] of single tokens, each against its own slot."""
    cache.write_tokens(layer, decode.slots, decode.lengths - 1, decode.span, k[:, decode.index], v[:, decode.index])
    keys, values = cache.layer(layer)
    span, first, count = decode.span, decode.first_slot, len(decode.slots)
    if first is not None:
        keys, values = keys[first : first + count, :, :span], values[first : first + count, :, :span]
    else:
        keys, values = keys[decode.slots, :, :span], values[decode.slots, :, :span]
    place = torch.arange(span, device=q.device)
    mask = place[None] < decode.lengths[:, None]
    if window is not None:
        mask &= place[None] >= decode.lengths[:, None] - window
    queries = q[:, decode.index].transpose(0, 1).unsqueeze(2).expand(-1, -1, MIN_ROWS, -1).contiguous()
    wide = mask[:, None, None].expand(-1, 1, MIN_ROWS, -1)
    return _sdpa(queries, keys, values, scale, wide, False)[:, :, 0].transpose(0, 1)


def install(model: nn.Module, route: Route) -> int:
    """Tells every attention module of the model where its batch is; returns how many there are."""
    AttentionInterface.register(NAME, attention)
    count = 0
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "forward"):
            module.onebase_route = route  # type: ignore[assignment]
            count += 1
    return count
