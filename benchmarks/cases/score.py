"""Scoring: logprobs of mixed lengths without padding; all of PPO's numbers in one pass."""

from __future__ import annotations

import numpy as np
import torch
from bench import Bench
from measure import Figure
from models import add_reward, random_ids, reward_dir

from onebase.server.engine.engine import Scoring
from onebase.server.jobs import BASE, ScoreRow

SHORTEST, LONGEST, SEQUENCES = 20, 256, 16
BATCH, PROMPT, LENGTH = 8, 64, 128
REWARD_UID = 100


def over_right_padded_times_fill(bench: Bench) -> Figure:
    """Plain transformers on the right-padded batch, times its fill (.54), over our packed step: logprobs, 39M fp32.

    16 sequences of 20 to 256 tokens, no adapter on either side. 1.0 means that padding is all that the peer loses.
    """
    ours, base = bench.ours("39m", "float32"), bench.base("39m", "float32")
    lengths = np.linspace(SHORTEST, LONGEST, SEQUENCES).astype(int)
    np.random.default_rng(0).shuffle(lengths)
    ids = random_ids(SEQUENCES, LONGEST)
    mask = torch.arange(LONGEST)[None] < torch.from_numpy(lengths)[:, None]
    scorings = [
        Scoring(ScoreRow(BASE, row[:length].numpy(), start=1, logprobs=True), None)
        for row, length in zip(ids, lengths.tolist(), strict=True)
    ]

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        logits = base(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]

    figure = bench.pairs(theirs, lambda: ours.engine.step(scorings, []))
    fill = float(mask.float().mean())
    detail = {**figure.detail, "over_right_padded": figure.value, "fill": fill}
    return Figure(figure.value * fill, figure.low * fill, figure.high * fill, figure.pairs, detail)


def fused_bf16(bench: Bench) -> Figure:
    """PEFT's three passes (policy with values, reference, reward) over our one step: 8 × (64+64) tokens, 39M bf16."""
    return _fused(bench, "39m", "bfloat16")


def fused_fp32(bench: Bench) -> Figure:
    """PEFT's three passes (policy with values, reference, reward) over our one step: 8 × (64+64) tokens, 39M fp32."""
    return _fused(bench, "39m", "float32")


def _fused(bench: Bench, name: str, dtype: str) -> Figure:
    ours, peft = bench.ours(name, dtype), bench.peft(name, dtype)
    engine = ours.engine
    reward = bench.once(add_reward, engine, REWARD_UID, reward_dir(name, dtype))
    ids = random_ids(BATCH, LENGTH)
    tokens = [row.numpy() for row in ids]
    policy = ours.policies[0]
    scorings = [
        *(Scoring(ScoreRow(1, row, PROMPT, logprobs=True, values=True), policy) for row in tokens),
        *(Scoring(ScoreRow(BASE, row, PROMPT, logprobs=True), None) for row in tokens),
        *(Scoring(ScoreRow(REWARD_UID, row, PROMPT, score=True), reward) for row in tokens),
    ]
    inner, head, hidden = peft.base_model.model.model, peft.base_model.model.lm_head, engine.facts.hidden_size
    value_head, score_head = torch.nn.Linear(hidden, 1), torch.nn.Linear(hidden, 1)

    def logprobs(states: torch.Tensor) -> torch.Tensor:  # only where a completion's token is asked for
        logits = head(states[:, PROMPT - 1 : -1]).float()
        return torch.log_softmax(logits, -1).gather(2, ids[:, PROMPT:, None])[..., 0]

    @torch.no_grad()
    def theirs() -> object:
        peft.set_adapter("a1")
        states = inner(input_ids=ids, use_cache=False).last_hidden_state
        policy_said = logprobs(states), value_head(states[:, PROMPT - 1 : -1].float())
        with peft.disable_adapter():
            reference_said = logprobs(inner(input_ids=ids, use_cache=False).last_hidden_state)
        peft.set_adapter("a2")
        reward_said = score_head(inner(input_ids=ids, use_cache=False).last_hidden_state[:, -1].float())
        return policy_said, reference_said, reward_said

    return bench.pairs(theirs, lambda: engine.step(scorings, []))
