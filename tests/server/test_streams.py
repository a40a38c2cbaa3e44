from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from onebase.server.errors import FailedPrecondition, ResourceExhausted, Unavailable
from onebase.server.jobs import CompletionChunk, GenerateJob, Sampling
from onebase.server.streams import stream


def chunk(index):
    return CompletionChunk(0, 0, (index,), (), (), "", 0, None)


def make_job(emit):
    return GenerateJob(adapter=1, prompts=[np.array([1])], sampling=Sampling(1), emit=emit)


class Worker:
    """Hands the job to the test."""

    def __init__(self, error=None):
        self.error = error
        self.job = None

    def submit(self, job):
        if self.error:
            raise self.error
        self.job = job


async def begin(chunks, worker):
    """The first chunk is asked for, and the job submitted."""
    first = asyncio.ensure_future(anext(chunks))
    while worker.job is None:
        await asyncio.sleep(0)
    return first


def test_chunks_come_in_order_and_end_with_the_job():
    async def run():
        worker = Worker()
        chunks = stream(worker, make_job, SimpleNamespace(queue="s7"), 12.5)
        first = await begin(chunks, worker)
        assert (worker.job.session, worker.job.deadline) == ("s7", 12.5)
        for index in range(5):
            await asyncio.to_thread(worker.job.emit, chunk(index))
        await asyncio.to_thread(worker.job.done.set_result, None)
        assert [(await first).tokens[0], *[one.tokens[0] async for one in chunks]] == [0, 1, 2, 3, 4]

    asyncio.run(run())


def test_an_error_comes_after_the_chunks_before_it():
    async def run():
        worker = Worker()
        chunks = stream(worker, make_job, None, None)
        first = await begin(chunks, worker)
        worker.job.emit(chunk(0))
        worker.job.done.set_exception(FailedPrecondition("NO", "no"))
        assert (await first).tokens == (0,)
        with pytest.raises(FailedPrecondition):
            await anext(chunks)

    asyncio.run(run())


def test_a_refused_submission_is_raised():
    async def run():
        with pytest.raises(Unavailable):
            await anext(stream(Worker(Unavailable("DRAINING", "later")), make_job, None, None))

    asyncio.run(run())


@pytest.mark.fault(5)
def test_closing_drops_the_job():
    """What a client that is gone leaves: gRPC closes the generator."""

    async def run():
        worker = Worker()
        async with contextlib.aclosing(stream(worker, make_job, None, None)) as chunks:
            first = await begin(chunks, worker)
            worker.job.emit(chunk(0))
            await first
            assert not worker.job.cancelled
        assert worker.job.cancelled

    asyncio.run(run())


def test_no_more_than_the_bound_ever_waits():
    async def run():
        worker = Worker()
        chunks = stream(worker, make_job, None, None, max_waiting=3)
        first = await begin(chunks, worker)
        worker.job.emit(chunk(0))
        await first
        for index in range(1, 4):
            worker.job.emit(chunk(index))
        await asyncio.sleep(0)
        assert not worker.job.cancelled
        for index in range(4, 50):
            worker.job.emit(chunk(index))
        await asyncio.sleep(0)
        assert worker.job.cancelled
        with pytest.raises(ResourceExhausted) as caught:
            await anext(chunks)
        assert caught.value.reason == "SLOW_CONSUMER"

    asyncio.run(run())


def test_a_worker_that_outlives_the_loop_is_not_disturbed():
    worker = Worker()

    async def run():
        await begin(stream(worker, make_job, None, None), worker)

    with contextlib.suppress(RuntimeError):
        asyncio.run(run())
    worker.job.emit(chunk(0))
    worker.job.done.set_result(None)
