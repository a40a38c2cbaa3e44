"""Decode: one token of each running completion, eight adapters side by side. Both sides end at the hidden states."""

from __future__ import annotations

import torch
from bench import POLICIES, Bench, Ours
from measure import Figure, Work
from models import random_ids
from transformers import DynamicCache

from onebase.server.engine.batch import Row

CONTEXT = 64
STEPS = 8
TOKEN = 5


def over_base_39m_fp32_b8(bench: Bench) -> Figure:
    """Plain transformers cached forward over our mixed decode step: 8 rows, 8 adapters, context 64, 39M fp32."""
    return _over_base(bench, "39m", "float32", 8)


def over_base_171m_bf16_b32(bench: Bench) -> Figure:
    """Plain transformers cached forward over our mixed decode step: 32 rows, 8 adapters, context 64, 171M bf16."""
    return _over_base(bench, "171m", "bfloat16", 32)


def over_peft_serial_39m_fp32_b8(bench: Bench) -> Figure:
    """PEFT, one set_adapter and pass per adapter, over our mixed decode step: 8 rows, 8 adapters, 39M fp32."""
    ours, peft = bench.ours("39m", "float32"), bench.peft("39m", "float32")
    inner = peft.base_model.model.model
    ids = random_ids(POLICIES, CONTEXT)
    caches = []
    with torch.no_grad():
        for index in range(POLICIES):
            peft.set_adapter(f"a{index + 1}")
            cache = DynamicCache()
            inner(input_ids=ids[index : index + 1], past_key_values=cache, use_cache=True)
            caches.append(cache)

    @torch.no_grad()
    def theirs() -> None:
        for _ in range(STEPS):
            for index, cache in enumerate(caches):
                peft.set_adapter(f"a{index + 1}")
                inner(input_ids=torch.tensor([[TOKEN]]), past_key_values=cache, use_cache=True)
        for cache in caches:
            cache.crop(-STEPS)

    return _with_slots(bench, theirs, ours, ids)


def exact_over_fused(bench: Bench) -> Figure:
    """Our exact decode step over ours with fused attention: 8 rows, 8 adapters, context 64, 39M fp32."""
    ids = random_ids(8, CONTEXT)
    works = []
    for exact in ("on", "off"):
        ours = bench.ours("39m", "float32", exact)
        slots = [ours.engine.kv.take() for _ in ids]
        works.append(our_decode(ours, ids, slots))
        for slot in slots:
            ours.engine.kv.give_back(slot)  # nobody else takes them meanwhile
    return bench.pairs(*works)


def _over_base(bench: Bench, name: str, dtype: str, rows: int) -> Figure:
    ours, ids = bench.ours(name, dtype), random_ids(rows, CONTEXT)
    return _with_slots(bench, base_decode(bench, name, dtype, ids), ours, ids)


def _with_slots(bench: Bench, theirs: Work, ours: Ours, ids: torch.Tensor) -> Figure:
    slots = [ours.engine.kv.take() for _ in ids]
    try:
        return bench.pairs(theirs, our_decode(ours, ids, slots))
    finally:
        for slot in slots:
            ours.engine.kv.give_back(slot)


def base_decode(bench: Bench, name: str, dtype: str, ids: torch.Tensor, steps: int = STEPS) -> Work:
    """Some steps of the plain base after the prompts [B, T]."""
    model, cache = bench.base(name, dtype).model, DynamicCache()
    tokens = torch.full((len(ids), 1), TOKEN)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def work() -> None:
        for _ in range(steps):
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache.crop(-steps)

    return work


def our_decode(ours: Ours, ids: torch.Tensor, slots: list[int], steps: int = STEPS) -> Work:
    """The same steps of our engine, each row under its own policy."""
    length = ids.shape[1]
    ours.forward([Row(ours.of(i), row.tolist(), 0, slots[i]) for i, row in enumerate(ids)])

    def work() -> None:
        for past in range(length, length + steps):
            ours.forward([Row(ours.of(i), [TOKEN], past, slot) for i, slot in enumerate(slots)])

    return work
