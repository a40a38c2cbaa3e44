"""Chunks of completions on their way from the worker's thread to a client, with bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from onebase.server.calls import submit
from onebase.server.errors import ResourceExhausted
from onebase.server.jobs import CompletionChunk, GenerateJob
from onebase.server.leases import Session
from onebase.server.ports import Takes

MAX_WAITING_CHUNKS = 10_000


async def stream(
    worker: Takes,
    make_job: Callable[[Callable[[CompletionChunk], None]], GenerateJob],
    session: Session | None,
    deadline: float | None,
    *,
    max_waiting: int = MAX_WAITING_CHUNKS,
) -> AsyncGenerator[CompletionChunk, None]:
    """Runs a generate job and yields its chunks; close the generator to drop the job.

    Args:
        worker: does it.
        make_job: makes the job, given what it shall call with each chunk.
        session: whose queue it stands in; None is everybody's without a session.
        deadline: on time.monotonic's clock.
        max_waiting: chunks that may wait for the client before the job is dropped.

    Raises:
        ResourceExhausted: SLOW_CONSUMER.
        OnebaseError: the worker's, on submission or as the job's outcome.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[CompletionChunk | None] = asyncio.Queue()
    slow = False

    def put(chunk: CompletionChunk | None) -> None:
        nonlocal slow
        if chunk is not None and waiting.qsize() >= max_waiting:
            slow = True
            job.cancel()
        else:
            waiting.put_nowait(chunk)

    job = make_job(lambda chunk: _hand_over(loop, put, chunk))
    submit(worker, job, session, deadline)
    job.done.add_done_callback(lambda _: _hand_over(loop, put, None))
    try:
        while (chunk := await waiting.get()) is not None and not slow:
            yield chunk
        if slow:
            raise ResourceExhausted(
                "SLOW_CONSUMER",
                f"more than {max_waiting} messages waited for this client, and the completions were dropped: read "
                "faster, or ask for fewer completions at once",
                retry_after=1.0,
            )
        job.done.result()
    finally:
        job.cancel()  # means nothing to a job that is done


def _hand_over(
    loop: asyncio.AbstractEventLoop, put: Callable[[CompletionChunk | None], None], chunk: CompletionChunk | None
) -> None:
    if not loop.is_closed():  # with the loop gone nobody reads any more
        loop.call_soon_threadsafe(put, chunk)
