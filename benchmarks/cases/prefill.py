"""Prefill: whole prompts through the layers, eight adapters side by side. Both sides end at the hidden states."""

from __future__ import annotations

import torch
from bench import POLICIES, Bench
from measure import Figure
from models import random_ids

ROWS, LENGTH = 8, 128


def over_base_171m_bf16(bench: Bench) -> Figure:
    """Plain transformers forward over our mixed step: 8 × 128 tokens, 8 adapters, 171M bf16."""
    return _over_base(bench, "171m", "bfloat16")


def over_base_39m_bf16(bench: Bench) -> Figure:
    """Plain transformers forward over our mixed step: 8 × 128 tokens, 8 adapters, 39M bf16."""
    return _over_base(bench, "39m", "bfloat16")


def over_peft_mixed_171m_bf16(bench: Bench) -> Figure:
    """PEFT's forward with `adapter_names` over our mixed step: 8 × 128 tokens, 8 adapters, 171M bf16."""
    ours, peft = bench.ours("171m", "bfloat16"), bench.peft("171m", "bfloat16")
    ids = random_ids(ROWS, LENGTH)
    names = [f"a{1 + row % POLICIES}" for row in range(ROWS)]

    @torch.no_grad()
    def theirs() -> object:  # logits of one position: as near to hidden states as its hooks let us get
        return peft(input_ids=ids, adapter_names=names, use_cache=False, logits_to_keep=1)

    return bench.pairs(theirs, lambda: ours.forward(ours.rows(ids)))


def _over_base(bench: Bench, name: str, dtype: str) -> Figure:
    ours, base = bench.ours(name, dtype), bench.base(name, dtype)
    ids = random_ids(ROWS, LENGTH)

    @torch.no_grad()
    def theirs() -> object:
        return base.model(input_ids=ids, use_cache=False)

    return bench.pairs(theirs, lambda: ours.forward(ours.rows(ids)))
