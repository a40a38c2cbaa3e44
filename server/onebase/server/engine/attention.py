"""Attention over a flat batch, for every architecture that asks transformers' AttentionInterface.

Three kinds of rows: fresh ones attend to themselves, single tokens to their slot in the KV cache, and chunks to their
slot and themselves. Nothing attends across rows.

Where the route is exact, a token's numbers are the same bit for bit whether it was prefilled, decoded or scored,
whoever else is in the batch. So the sums are made in one way only: scores and probabilities by batched products of
at least MIN_ROWS rows over lengths padded to KV_BLOCK, and the values summed SUM_BLOCK positions at a time, since a
BLAS is free to cut a longer sum in two. Fused kernels (flash attention) round by length; they are used where the
route is not exact.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

from onebase.server.engine.batch import MIN_ROWS, DecodeBatch, FreshGroup, Route, Row, padded
from onebase.server.engine.kv import KVCache

NAME = "onebase"
"""The name under which transformers knows this attention."""

SUM_BLOCK = 128
"""Positions of one product in the sum over values."""

QUERY_BLOCK = 64
"""Queries of one block: each block sees the keys up to its own end, so smaller blocks waste less on what is masked."""

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
    softcap: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attends each row of the current batch to itself and its past.

    Returns:
        [1, N, heads, head_dim], as transformers wants it, and no weights.

    Raises:
        UnsupportedAttention: for sinks, biases and other things that would change the numbers.
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
    for row in batch.rows:
        if row.past == 0 and row.slot is not None:
            _cache(route).write(layer, row.slot, 0, k[:, row.start : row.stop], v[:, row.start : row.stop])
    biases = Biases(route, sliding_window, softcap, q)
    parts = [(group.flat, _fresh(group, q, k, v, scale, biases)) for group in batch.fresh]
    for row in batch.chunks:
        part = _chunk(_cache(route), layer, row, q, k, v, scale, biases)
        parts.append((torch.arange(row.start, row.stop, device=q.device), part))
    if batch.decode is not None:
        part = _decode(_cache(route), layer, batch.decode, q, k, v, scale, biases)
        parts.append((batch.decode.index, part))
    if len(parts) == 1 and parts[0][1].shape[1] == batch.size and batch.decode is None:
        out = parts[0][1]  # one group that fills the batch is in its order already
    else:
        out = torch.zeros_like(q).index_copy(1, torch.cat([at for at, _ in parts]), torch.cat([p for _, p in parts], 1))
    return out.transpose(0, 1).unsqueeze(0), None


def _cache(route: Route) -> KVCache:
    if route.kv is None:
        raise UnsupportedAttention("a row with a slot, and no cache")
    return route.kv


class Biases:
    """What is added to scores: 0 where a query may look, -inf where not. Made once a step for all layers alike.

    Before that, scores are capped where the model says so (`softcap`).
    """

    def __init__(self, route: Route, window: int | None, softcap: float | None, like: torch.Tensor) -> None:
        self._route = route
        self._window = window
        self._like = like
        self.softcap = softcap
        self.exact = route.exact
        self.dtype = torch.float32 if route.wide else like.dtype

    def causal(self, at: tuple[int, int], stop: int, shared: int) -> torch.Tensor:
        """[1, shared * (at[1] - at[0]), stop]: queries at these places, keys from 0, once for each head that shares."""

        def make() -> torch.Tensor:
            places = torch.arange(*at, device=self._like.device)
            return self._bias(places[:, None], stop).repeat(shared, 1)[None]

        return self._route.remember(("causal", *at, stop, shared, self._window), make)

    def lengths(self, decode: DecodeBatch, kv_heads: int, rows: int) -> torch.Tensor:
        """[B * kv_heads, rows, span]: the last token of each sequence, keys from 0."""

        def make() -> torch.Tensor:
            bias = self._bias(decode.lengths[:, None] - 1, decode.span)
            wide = bias[:, None, None].expand(-1, kv_heads, rows, -1)
            return wide.reshape(len(decode.slots) * kv_heads, rows, decode.span)

        return self._route.remember(("lengths", kv_heads, rows, self._window), make)

    def _bias(self, at: torch.Tensor, stop: int) -> torch.Tensor:
        """[Q, stop] for queries at places [Q, 1]."""
        place = torch.arange(stop, device=at.device)[None]
        allowed = place <= at
        if self._window is not None:
            allowed &= place > at - self._window
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, -torch.inf)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor,
    *,
    softcap: float | None,
    exact: bool,
) -> torch.Tensor:
    """Attention of G independent problems.

    Args:
        q: [G, M, head_dim], M at least MIN_ROWS.
        k: [G, S, head_dim], S a multiple of KV_BLOCK.
        v: [G, S, head_dim].
        scale: of the scores.
        bias: [G or 1, M, S], added to the scores; its dtype is the products'.
        softcap: scores become softcap * tanh(scores / softcap) before the bias is added; None leaves them.
        exact: whether a query's numbers must not depend on M, S and G.

    Returns:
        [G, M, head_dim].
    """
    narrow = q.dtype
    if narrow != bias.dtype:
        q, k, v = (t.to(bias.dtype) for t in (q, k, v))
    if not exact and softcap is None:  # the fused kernels know no cap
        return nn.functional.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=bias[:, None], scale=scale
        )[:, 0].to(narrow)
    if softcap is None:
        scores = torch.baddbmm(bias.expand(q.shape[0], -1, -1), q, k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.tanh(torch.bmm(q, k.transpose(1, 2)) * scale / softcap) * softcap + bias
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(weights[:, :, :SUM_BLOCK], v[:, :SUM_BLOCK])
    for start in range(SUM_BLOCK, k.shape[1], SUM_BLOCK):
        part = slice(start, start + SUM_BLOCK)
        out = out + torch.bmm(weights[:, :, part], v[:, part])
    return out.to(narrow)


def _fresh(
    group: FreshGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, biases: Biases
) -> torch.Tensor:
    """[heads, t, head_dim] of the group's t tokens: rows of one padded length P that begin their sequences."""
    heads, kv_heads, dim = q.shape[0], k.shape[0], q.shape[2]
    count, length = group.gather.shape
    shared = heads // kv_heads  # query heads that share a key-value head stand below each other
    queries = q[:, group.gather].view(kv_heads, shared, count, length, dim).transpose(1, 2)
    keys = k[:, group.gather].view(kv_heads * count, length, dim)
    values = v[:, group.gather].view(kv_heads * count, length, dim)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        block = queries[:, :, :, start:stop].reshape(kv_heads * count, shared * (stop - start), dim)
        bias = biases.causal((start, stop), stop, shared)
        out = _attend(block, keys[:, :stop], values[:, :stop], scale, bias, softcap=biases.softcap, exact=biases.exact)
        blocks.append(out.view(kv_heads, count, shared, stop - start, dim))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)
    return out.transpose(1, 2).reshape(heads, count * length, dim)[:, group.real]


def _chunk(
    cache: KVCache,
    layer: int,
    row: Row,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    biases: Biases,
) -> torch.Tensor:
    """[heads, t, head_dim] of several tokens that go on with a cached sequence."""
    part, slot = slice(row.start, row.stop), row.slot
    if slot is None:
        raise UnsupportedAttention("a row with a past, and no slot")
    cache.write(layer, slot, row.past, k[:, part], v[:, part])
    keys, values = cache.view(layer, slot, 1)
    heads, count, dim = q.shape[0], len(row.tokens), q.shape[2]
    kv_heads, span = k.shape[0], padded(row.past + count)
    shared = heads // kv_heads
    rows = max(count, MIN_ROWS)
    fill = rows - count
    bias = biases.causal((row.past, row.past + rows), span, shared)
    queries = nn.functional.pad(q[:, part], (0, 0, 0, fill)).reshape(kv_heads, shared * (count + fill), dim)
    out = _attend(queries, keys[:, :span], values[:, :span], scale, bias, softcap=biases.softcap, exact=biases.exact)
    return out.view(heads, count + fill, dim)[:, :count]


def _decode(
    cache: KVCache,
    layer: int,
    decode: DecodeBatch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    biases: Biases,
) -> torch.Tensor:
    """[heads, B, head_dim] of single tokens, each against its own slot."""
    cache.write_tokens(layer, decode.slots, decode.lengths - 1, decode.span, k[:, decode.index], v[:, decode.index])
    heads, kv_heads, dim, count, span = q.shape[0], k.shape[0], q.shape[2], len(decode.slots), decode.span
    if decode.first_slot is not None:
        keys, values = cache.view(layer, decode.first_slot, count)
        keys, values = keys[:, :span], values[:, :span]
    else:
        keys, values = (t[decode.slots, :, :span].view(count * kv_heads, span, dim) for t in cache.layer(layer))
    shared = heads // kv_heads
    copies = -(-MIN_ROWS // shared)
    queries = q[:, decode.index].transpose(0, 1).reshape(count * kv_heads, shared, dim).repeat(1, copies, 1)
    bias = biases.lengths(decode, kv_heads, shared * copies)
    out = _attend(queries, keys, values, scale, bias, softcap=biases.softcap, exact=biases.exact)
    return out[:, :shared].reshape(count, heads, dim).transpose(0, 1)


def install(model: nn.Module, route: Route) -> int:
    """Tells every attention module of the model where its batch is; returns how many there are."""
    AttentionInterface.register(NAME, attention)
    count = 0
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "forward"):
            module.onebase_route = route  # type: ignore[assignment]
            count += 1
    return count
