"""The asyncio client against a real server: the sync client's numbers to the bit, many calls at once, cancellation."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from e2e.conftest import READERS, REWARDS, TRAINEES
from e2e.test_concurrency import joined, plain, sequences
from support import RunningServer

from onebase.client import (
    AdamW,
    AsyncClient,
    Client,
    NotFoundError,
    PpoLoss,
    SamplingParams,
    Sequence,
    TrainingSequence,
    connect_async,
)

pytestmark = pytest.mark.e2e
SAMPLING = SamplingParams(max_new_tokens=12, n=2, seed=3)
LONG = SamplingParams(max_new_tokens=110, n=4, ignore_eos=True)


async def idle(client: AsyncClient) -> None:
    """Returns when nothing runs on the server; the cache's slots are free then."""
    for _ in range(200):
        status = await client.status()
        if status.kv_slots_used == 0 and not any(queue.waiting + queue.running for queue in status.queues):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(status.queues)


async def test_it_gives_the_sync_clients_numbers(server: RunningServer, client: Client) -> None:
    some, trainee = sequences(random.Random(1), 5), TRAINEES[0]
    with client.open_session(READERS[0]) as session:
        expected = [
            session.generate(["w1 w2", [5, 6]], sampling=SAMPLING, logprobs=True),
            joined(session.stream([[5]], sampling=SAMPLING)),
            session.logprob(some, entropy=True),
            session.reference_logprob(some),
            session.reward(some, REWARDS, per_token=True),
            session.score(some, rewards=dict.fromkeys(REWARDS, 0.5)),
            client.info(),
        ]
    with client.open_session(trainee) as session:
        session.save_adapter("aio/fresh", overwrite=True)
        (scored,) = session.score(some[:1], outputs=["logprobs", "values"])
        assert scored.logprobs is not None
        assert scored.values is not None
        advantages = scored.logprobs * 0 + 1
        row = TrainingSequence(
            some[0].prompt, some[0].completion, scored.logprobs, scored.values, advantages, advantages
        )
        trained = [session.forward_backward(row, PpoLoss()).metrics, session.optim_step(AdamW(1e-2)).grad_norm]
        after = session.logprob(some)
        session.load_adapter(trainee, "aio/fresh", replace=True)

    async with connect_async(server.address) as other:
        async with other.open_session(READERS[0]) as same:
            stream = [chunk async for chunk in same.stream([[5]], sampling=SAMPLING)]
            found = [
                await same.generate(["w1 w2", [5, 6]], sampling=SAMPLING, logprobs=True),
                joined(stream),
                await same.logprob(some, entropy=True),
                await same.reference_logprob(some),
                await same.reward(some, REWARDS, per_token=True),
                await same.score(some, rewards=dict.fromkeys(REWARDS, 0.5)),
                await other.info(),
            ]
        async with other.open_session(trainee) as same:
            policy = same.policy()
            passed = await policy.forward_backward(row, PpoLoss())
            again = [passed.metrics, (await policy.optim_step(AdamW(1e-2))).grad_norm]
            then = await policy.logprob(some)
            await same.load_adapter(trainee, "aio/fresh", replace=True)

    assert plain(found) == plain(expected)
    assert again == trained
    assert [plain(one.logprobs) for one in then] == [plain(one.logprobs) for one in after]


async def test_many_calls_at_once_are_answered_as_one_by_one(server: RunningServer, client: Client) -> None:
    prompts = [sequences(random.Random(seed), 1) for seed in range(24)]
    with client.open_session() as session:
        written = [
            session.generate(one[0].prompt, adapter=READERS[i % 12], sampling=SAMPLING) for i, one in enumerate(prompts)
        ]
        rewarded = [session.reward(one, REWARDS) for one in prompts]

    async with connect_async(server.address) as other, other.open_session() as session:
        calls = [
            session.generate(one[0].prompt, adapter=READERS[i % 12], sampling=SAMPLING) for i, one in enumerate(prompts)
        ]
        answers = await asyncio.gather(*calls, *[session.reward(one, REWARDS) for one in prompts])

    assert plain(answers) == plain([*written, *rewarded])


async def test_cancelled_tasks_free_the_device_and_trouble_nobody(server: RunningServer) -> None:
    some = sequences(random.Random(2), 4)
    async with connect_async(server.address) as client, client.open_session(READERS[1]) as session:
        expected = await session.score(some, rewards=REWARDS)
        begun = asyncio.Event()

        async def write() -> None:
            async for _ in session.stream([[5]], sampling=LONG):
                begun.set()

        writers = [asyncio.create_task(write()) for _ in range(4)]
        scorers = [asyncio.create_task(session.score(some, rewards=REWARDS)) for _ in range(8)]
        await asyncio.wait_for(begun.wait(), 60)
        for task in (*writers, *scorers[::2]):
            task.cancel()
        ends = await asyncio.gather(*writers, return_exceptions=True)
        answers = await asyncio.gather(*scorers[1::2])

        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        assert [plain(answer) for answer in answers] == [plain(expected)] * 4
        await idle(client)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.generate([[5]] * 8, sampling=LONG), 0.05)
        await idle(client)
        assert (await session.refresh()).ppo_adapter_name == READERS[1]


async def test_a_session_outlives_its_ttl_while_it_is_open_and_ends_with_its_block(server: RunningServer) -> None:
    async with connect_async(server.address) as client:
        async with client.open_session(READERS[2], label="kept", ttl=1.0) as session:
            begin = time.monotonic()
            while time.monotonic() - begin < 3.0:  # it says nothing by itself for three times its ttl
                await asyncio.sleep(0.2)
            assert (await session.refresh()).leases == (READERS[2],)

        assert "kept" not in {one.label for one in (await client.status()).sessions}
        async with client.open_session(READERS[2]):  # the lease is free, without waiting for it
            pass

        forgotten = await client.open_session(READERS[2], ttl=1.0)
        await forgotten._keepalive.stop(10)
        await asyncio.sleep(2.0)
        with pytest.raises(NotFoundError):
            await forgotten.reward(Sequence([5], [6]), REWARDS)
