"""A user's program, type-checked as a project of its own: the sync client."""

from collections.abc import Mapping
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import onebase.client as onebase
from onebase.client import AdamW, PpoLoss, SamplingParams, Sequence, TrainingSequence

Floats = NDArray[np.float32]


def rollout(session: onebase.Session, prompts: list[str]) -> list[Sequence]:
    completions = session.generate(prompts, sampling=SamplingParams(max_new_tokens=8, n=2, seed=1), logprobs=True)
    assert_type(completions, list[onebase.Completion])
    assert_type(completions[0].tokens, NDArray[np.int32])
    assert_type(completions[0].logprobs, Floats | None)
    assert_type(completions[0].finish_reason, onebase.FinishReason)
    return [Sequence(prompts[c.prompt_index], c.tokens) for c in completions]


def train(session: onebase.Session, rows: list[TrainingSequence]) -> float:
    passed = session.forward_backward(rows, PpoLoss(cliprange=0.1), denominator=3.0)
    assert_type(passed, onebase.ForwardBackward)
    assert_type(passed.metrics, Mapping[str, float])
    return assert_type(session.optim_step(AdamW(1e-4), max_grad_norm=1.0), onebase.OptimStep).grad_norm


def main() -> None:
    with onebase.connect("127.0.0.1:7070", wait=5) as client:
        assert_type(client, onebase.Client)
        assert_type(client.info().base.vocab_size, int)
        assert_type(client.reward(Sequence("a", [1, 2]))[0].score, float)
        with client.open_session("policy_1", label="typed", ttl=30) as session:
            assert_type(session, onebase.Session)
            for scored in session.score(rollout(session, ["a", "b"]), rewards={"helpful": 0.5}, outputs=["values"]):
                assert_type(scored.values, Floats | None)
            with session.stream("a") as chunks:
                assert_type(chunks, onebase.Stream[onebase.CompletionChunk])
                for chunk in chunks:
                    assert_type(chunk.text, str)
            policy = session.policy("policy_2")
            assert_type(policy, onebase.Policy)
            assert_type(policy.facts().kind, onebase.AdapterKind)
    try:
        onebase.connect()
    except onebase.OnebaseError as error:
        assert_type(error.retry_after, float | None)
