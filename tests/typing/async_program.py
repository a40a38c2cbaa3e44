"""A user's program, type-checked as a project of its own: the asyncio client."""

import asyncio
from typing import assert_type

import onebase.client as onebase
from onebase.client import AdamW, Sequence, TrainingSequence, aio


async def train(policy: onebase.AsyncPolicy, rows: list[TrainingSequence]) -> float:
    assert_type(await policy.forward_backward(rows), onebase.ForwardBackward)
    return (await policy.optim_step(AdamW(1e-4))).grad_norm


async def main() -> None:
    async with onebase.connect_async("127.0.0.1:7070", wait=5) as client, client.open_session("p") as session:
        assert_type(client, onebase.AsyncClient)
        assert_type(session, onebase.AsyncSession)
        answers = await asyncio.gather(*[session.generate(prompt) for prompt in ("a", "b")])
        assert_type(answers, list[list[onebase.Completion]])
        async with session.stream("a") as chunks:
            assert_type(chunks, onebase.AsyncStream[onebase.CompletionChunk])
            async for chunk in chunks:
                assert_type(chunk, onebase.CompletionChunk)
        scored, rewarded = await asyncio.gather(
            session.score(Sequence("a", "b")), client.reward(Sequence("a", "b"), "helpful")
        )
        assert_type(scored, list[onebase.Score])
        assert_type(rewarded, list[onebase.Reward])
        assert_type(session.policy(), onebase.AsyncPolicy)
        assert_type(session.ppo_adapter_name, str)
    other = await aio.connect()
    assert_type(other, aio.AsyncClient)
    opening = other.open_session()
    assert_type(opening, aio.Opening[aio.AsyncSession])
    assert_type(await opening, aio.AsyncSession)
    await other.close()
