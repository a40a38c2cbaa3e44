"""A proof by running: does the engine compute, for this very model, what transformers' own code computes?

Before a server serves, the same random sequences go through the untouched model (eager attention, one sequence at a
time, no cache) and through the engine: packed side by side, prefilled and decoded token by token, and continued in
chunks. Where the numbers differ the model is refused by name; being refused is better than being wrong. What such short
sequences cannot show, masks that differ only far away, `masks` shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from onebase.server.engine import attention, masks
from onebase.server.engine.batch import Row
from onebase.server.engine.engine import Engine
from onebase.server.errors import FailedPrecondition

LENGTHS = (23, 7, 40)
"""Sequences of the proof, in tokens; a sliding window below the longest is gone beyond."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of logits that rounding explains, relative to their largest magnitude."""


@dataclass(frozen=True)
class Proof:
    """What was seen."""

    difference: float
    """The largest difference between the model's logits and ours, relative to their largest magnitude."""
    cached_difference: float
    """The largest difference between our own logits of whole sequences, and of prompts, chunks and single tokens."""

    @property
    def exact(self) -> bool:
        """Whether our logits of a token are the same bit for bit, however it came."""
        return self.cached_difference == 0.0


@torch.no_grad()
def prove(engine: Engine, model: PreTrainedModel) -> Proof:
    """Compares the engine with the model's own forward, and with itself.

    Returns:
        The differences.

    Raises:
        FailedPrecondition: they differ, or the model asks for attention that the engine does not have.
    """
    name = type(model).__name__
    random = torch.Generator().manual_seed(0)
    lengths = [min(length, engine.facts.max_context) for length in LENGTHS]
    texts = [torch.randint(0, engine.facts.vocab_size, (n,), generator=random).tolist() for n in lengths]
    try:
        model.set_attn_implementation("eager")
        device = engine.facts.device
        truth = [model(input_ids=torch.tensor([t], device=device), use_cache=False).logits[0].float() for t in texts]
        masks.check(model, engine.facts.max_context, device)
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            raise attention.UnsupportedAttention("it does not let its attention be replaced")
        packed = _packed(engine, texts)
        cached = _cached(engine, texts)
    except attention.UnsupportedAttention as error:
        raise _refusal(name, str(error)) from error
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, NotImplementedError) as error:
        raise _refusal(name, f"its forward failed in a flat batch: {error}") from error
    worst = 0.0
    for way, found in (("packed", packed), ("cached", cached)):
        difference = max(_relative(f, t) for f, t in zip(found, truth, strict=False))  # a small cache holds fewer
        if not difference <= TOLERANCE.get(model.dtype, 1e-4):
            raise _refusal(name, f"{way} logits differ from transformers' own by {difference:.1e} of their magnitude")
        worst = max(worst, difference)
    itself = max(float((c - p).abs().max()) for c, p in zip(cached, packed, strict=False))
    return Proof(worst, itself)


def _packed(engine: Engine, texts: list[list[int]]) -> list[torch.Tensor]:
    """All sequences in one flat batch."""
    rows = [Row(None, text) for text in texts]
    _, hidden = engine.forward(rows)
    return [engine.head.logits(hidden[row.start : row.stop]) for row in rows]


def _cached(engine: Engine, texts: list[list[int]]) -> list[torch.Tensor]:
    """Prefill of the first part, a chunk of five tokens, then one token at a time, all sequences side by side."""
    texts = texts[: max(1, engine.kv.free(max(len(text) for text in texts)))]
    slots = [engine.kv.take() for _ in texts]
    done = [len(text) // 2 for text in texts]
    rows = [Row(None, text[:n], 0, slot) for text, n, slot in zip(texts, done, slots, strict=True)]
    found = [[] for _ in texts]  # type: list[list[torch.Tensor]]
    step = 5
    while rows:
        _, hidden = engine.forward(rows)
        for row in rows:
            i = slots.index(row.slot or 0)
            found[i].append(engine.head.logits(hidden[row.start : row.stop]))
            done[i] = row.past + len(row.tokens)
        rows = [
            Row(None, text[n : n + step], n, slot)
            for text, n, slot in zip(texts, done, slots, strict=True)
            if n < len(text)
        ]
        step = 1
    for slot in slots:
        engine.kv.give_back(slot)
    return [torch.cat(parts) for parts in found]


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-6))


def _refusal(architecture: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "ARCHITECTURE_NOT_SUPPORTED",
        f"{architecture} is refused, because the engine cannot be shown to run it right: {why}",
        field="model",
    )
