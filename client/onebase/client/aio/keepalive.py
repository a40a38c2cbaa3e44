"""A task that keeps a session alive, and tells the server that the session's client is there."""

from __future__ import annotations

import asyncio
import contextlib
import random
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from onebase.client.aio.transport import Transport, task_is_cancelled
from onebase.client.codec.rpc import Call
from onebase.client.errors import CancelledError, NotFoundError, OnebaseError, UnimplementedError, translate
from onebase.client.retry import Pauses
from onebase.client.transport import CLIENT_CLOSED

Beat = Callable[[], Coroutine[Any, Any, bool]]


class KeepAlive:
    """Attends a session from a task of its own, until the session ends or `stop` is called.

    A stream lives as long as this process does, and is opened again where it breaks. A server that knows no such
    streams has a method called over and over, until it returns False.

    The method's object is held weakly: when nobody else holds it any more, the task ends, and so the lease of a
    session that was forgotten runs out.

    Args:
        transport: sends the call.
        attend: opens the stream.
        beat: the bound method that is called where there are no streams; returns whether to go on.
        interval: seconds from one call of it to the next, and the longest wait for another stream.
    """

    def __init__(self, transport: Transport, attend: Call[Any], beat: Beat, interval: float) -> None:
        self._loop = asyncio.get_running_loop()
        run = _run(transport, attend, weakref.WeakMethod(beat, self._forget), interval)
        self._task = self._loop.create_task(run, name="onebase-keepalive")

    @property
    def running(self) -> bool:
        """Whether the task is still there."""
        return not self._task.done()

    async def stop(self, wait: float) -> None:
        """Cancels the task and a call that it has under way; returns when it has ended, or after `wait` seconds."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=wait)

    def _forget(self, _: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._task.cancel)


async def _run(transport: Transport, attend: Call[Any], beat: weakref.WeakMethod[Beat], interval: float) -> None:
    pauses = Pauses(transport.backoff, interval)
    while True:
        try:
            await _listen(transport, attend, pauses)
        except NotFoundError:
            return
        except UnimplementedError:
            await _beat_on(beat, interval)
            return
        except OnebaseError as error:
            if error.reason == CLIENT_CLOSED:
                return
            await asyncio.sleep(pauses.after(error, random.random()))
        else:
            return


async def _listen(transport: Transport, attend: Call[Any], pauses: Pauses) -> None:
    """Returns when the server ends the stream, because the session has ended.

    Raises:
        OnebaseError: the stream broke.
    """
    stream = transport.begin(attend, None)
    try:
        async for _ in stream:  # what it says may be older than the answers to calls, so only that it speaks counts
            pauses.heard()
    except grpc.RpcError as error:
        raise translate(error, attend.rpc.method) from None
    except asyncio.CancelledError:
        if task_is_cancelled():
            raise
        transport.check_open()
        raise CancelledError("the server cancelled the stream") from None
    finally:
        stream.cancel()


async def _beat_on(beat: weakref.WeakMethod[Beat], interval: float) -> None:
    while True:
        await asyncio.sleep(interval)
        method = beat()
        if method is None or not await method():
            return
        del method
