"""A job's way through the worker and back, for code on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import grpc

from onebase.server.errors import Gone
from onebase.server.identity import caller
from onebase.server.jobs import Job
from onebase.server.leases import Session
from onebase.server.ports import Takes

P = ParamSpec("P")
R = TypeVar("R")

_LOOKS = 8
"""So often a call looks what its names mean; each time another call has replaced the adapter meanwhile."""


def deadline_of(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """The call's deadline on time.monotonic's clock, or None if the client gave none."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def queue_of(session: Session | None) -> str:
    """Whose turns a call takes."""
    return session.queue if session is not None else ""


def submit(worker: Takes, job: Job[Any], session: Session | None, deadline: float | None) -> None:
    """Queues a job in its session's name.

    Raises:
        OnebaseError: the worker's.
    """
    job.tenant = caller().tenant
    job.session = queue_of(session)
    job.deadline = deadline
    worker.submit(job)


async def perform(worker: Takes, job: Job[R], session: Session | None, deadline: float | None) -> R:
    """Submits a job that changes nothing, and returns its result; a cancel here drops the job.

    Args:
        worker: does it.
        job: what to do.
        session: whose queue it stands in; None is everybody's without a session.
        deadline: on time.monotonic's clock; None waits as long as it takes.

    Raises:
        OnebaseError: the worker's, on submission or as the job's outcome.
    """
    submit(worker, job, session, deadline)
    outcome = _outcome(job)
    try:
        await asyncio.wait((outcome,))  # a cancel here does not reach job.done, which is the worker's to resolve
    finally:
        job.cancel()  # means nothing to a job that is done
    return outcome.result()


async def settle(worker: Takes, job: Job[R], session: Session | None = None, deadline: float | None = None) -> R:
    """Submits a job that changes something, and returns its result, even through a cancel.

    A cancel asks the worker to drop the job; it may be too late for that. Either way this returns what became of
    it, so that the registry never disagrees with the engine.

    Raises:
        OnebaseError: the worker's, on submission or as the job's outcome; then the job had no effect.
    """
    submit(worker, job, session, deadline)
    outcome = _outcome(job)
    while not outcome.done():
        try:
            await asyncio.wait((outcome,))
        except asyncio.CancelledError:
            job.cancel()
    return outcome.result()


def looks_again(call: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Has a call that names adapters begin anew where one is replaced meanwhile: its name means something all the time.

    Of one that was deleted the new look says so. Nothing may have been changed before `Gone` is raised.
    """

    @wraps(call)
    async def looked(*args: P.args, **named: P.kwargs) -> R:
        for _ in range(_LOOKS - 1):
            with contextlib.suppress(Gone):
                return await call(*args, **named)
        return await call(*args, **named)

    return looked


def stream_looks_again(call: Callable[P, AsyncIterator[R]]) -> Callable[P, AsyncGenerator[R, None]]:
    """`looks_again` for a stream; once it has answered anything, its adapters are bound."""

    @wraps(call)
    async def looked(*args: P.args, **named: P.kwargs) -> AsyncGenerator[R, None]:
        for left in reversed(range(_LOOKS)):
            begun = False
            try:
                async with contextlib.aclosing(call(*args, **named)) as answers:  # type: ignore[type-var]
                    async for answer in answers:
                        begun = True
                        yield answer
                return
            except Gone:
                if begun or not left:
                    raise

    return looked


async def unbroken(task: asyncio.Task[R]) -> R:
    """What becomes of a task, also where this is cancelled meanwhile: for changes that must not stop half-way."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    return task.result()


async def settled(work: Coroutine[Any, Any, R]) -> R:
    """`unbroken` for work that has not begun."""
    return await unbroken(asyncio.get_running_loop().create_task(work))


def _outcome(job: Job[R]) -> asyncio.Future[R]:
    """The job's `done` on this loop; nobody need be left to look at its error."""
    outcome = asyncio.wrap_future(job.done)
    outcome.add_done_callback(_look)
    return outcome


def _look(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()
