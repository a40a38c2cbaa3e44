"""Sends calls over an asyncio channel: the deadlines, retries and errors of `onebase.client.transport`, awaited."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc

from onebase.client.attempts import Attempts
from onebase.client.channel import Security, open_async_channel
from onebase.client.codec.rpc import Call
from onebase.client.errors import CancelledError, OnebaseError, translate
from onebase.client.retry import Backoff
from onebase.client.transport import CLIENT_CLOSED
from onebase.client.waits import OnWait, Waits

Result = TypeVar("Result")


class Transport:
    """A channel and the rules of its calls. Any number of tasks of one event loop may use it.

    Args:
        target: host and port of the server.
        timeout: seconds that a call may take, retries included, unless it says otherwise.
        backoff: how long to wait between retries.
        security: the token and TLS.
        on_wait: is told when calls begin to wait for the server, and when they are answered again; None: logging is.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float,
        backoff: Backoff | None = None,
        security: Security | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self.backoff = backoff or Backoff()
        self._waits = Waits(target, on_wait)
        security = security or Security()
        self._metadata = security.metadata
        self._channel = open_async_channel(target, security)
        self._closed = asyncio.Event()

    async def run(self, call: Call[Result], timeout: float | None = None) -> Result:
        """Sends a call and reads its answer; cancelling the task that waits for it cancels the call.

        Raises:
            OnebaseError: the last attempt's failure.
        """
        send = self._sender(call)
        attempts = self.attempts(call, timeout)
        while True:
            self.check_open()
            try:
                answer = await send(attempts.remaining())
            except grpc.RpcError as error:
                await self.sleep(attempts.delay_after(translate(error, call.rpc.method)))
            except asyncio.CancelledError:
                if not task_is_cancelled():  # then the channel was closed under the call
                    self.check_open()
                raise
            else:
                attempts.answered()
                return call.read(answer)

    def _sender(self, call: Call[Any]) -> Callable[[float], Awaitable[Any]]:
        """What sends one attempt of a call within so many seconds."""
        path, body = call.rpc.path, call.body
        write, read = call.rpc.request.SerializeToString, call.rpc.answer.FromString
        if body is None:
            send = self._channel.unary_unary(path, request_serializer=write, response_deserializer=read)
            return lambda remaining: send(call.request, timeout=remaining, metadata=self._metadata)
        upload = self._channel.stream_unary(path, request_serializer=write, response_deserializer=read)
        return lambda remaining: upload(
            itertools.chain((call.request,), body()), timeout=remaining, metadata=self._metadata
        )

    async def collect(self, call: Call[Result], timeout: float | None = None) -> list[Result]:
        """Sends a call whose answer is a stream, and reads all of it; a failure at any time begins it anew.

        Raises:
            OnebaseError: the last attempt's failure.
        """
        attempts = self.attempts(call, timeout)
        while True:
            stream = self.begin(call, attempts.remaining())
            try:
                messages = [call.read(message) async for message in stream]
            except grpc.RpcError as error:
                failure = translate(error, call.rpc.method)
            except asyncio.CancelledError:
                if not task_is_cancelled():  # then the channel was closed under the call
                    self.check_open()
                raise
            else:
                attempts.answered()
                return messages
            finally:
                stream.cancel()
            await self.sleep(attempts.delay_after(failure))

    def stream(self, call: Call[Result], timeout: float | None = None) -> AsyncStream[Result]:
        """Sends a call whose answer is a stream, and gives it to be read."""
        return AsyncStream(self, call, timeout)

    def begin(self, call: Call[Any], remaining: float | None) -> grpc.aio.UnaryStreamCall[Any, Any]:
        """Starts one attempt of a streaming call; None has no deadline, and waits for a server as long as it takes."""
        self.check_open()
        send = self._channel.unary_stream(
            call.rpc.path,
            request_serializer=call.rpc.request.SerializeToString,
            response_deserializer=call.rpc.answer.FromString,
        )
        return send(call.request, timeout=remaining, metadata=self._metadata, wait_for_ready=remaining is None)

    def attempts(self, call: Call[Any], timeout: float | None) -> Attempts:
        """The attempts of one call, of which the clock starts now."""
        seconds = self._timeout if timeout is None else timeout
        return Attempts(self.backoff, repeatable=call.rpc.repeatable, seconds=seconds, waits=self._waits)

    def check_open(self) -> None:
        """CancelledError if the transport was closed."""
        if self._closed.is_set():
            raise CancelledError("the client is closed", reason=CLIENT_CLOSED) from None

    async def sleep(self, seconds: float) -> None:
        """Waits; CancelledError if the transport is closed meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return
        self.check_open()

    async def close(self) -> None:
        """Cancels what is under way and closes the channel; may be called twice."""
        self._closed.set()
        await self._channel.close()


class AsyncStream(Generic[Result]):
    """Iterates with `async for` over what a server streams. Closing it, or leaving its `async with` block, cancels
    the call; so does cancelling the task that waits for its next item.

    A failure is retried as long as nothing was received: from then on, a second attempt could contradict the first.
    """

    def __init__(self, transport: Transport, call: Call[Result], timeout: float | None) -> None:
        self._transport = transport
        self._call = call
        self._attempts = transport.attempts(call, timeout)
        self._closed = False
        self._received = False
        self._stream = transport.begin(call, self._attempts.remaining())

    def __del__(self) -> None:
        # The channel holds its calls, so one that nobody reads any more would go on.
        if hasattr(self, "_stream"):  # else it never began
            self._stream.cancel()

    def __aiter__(self) -> AsyncStream[Result]:
        return self

    async def __anext__(self) -> Result:
        while not self._closed:
            try:
                message = await self._stream.read()
            except grpc.RpcError as error:
                if not self._closed:  # else this is the echo of close()
                    await self._begin_again(translate(error, self._call.rpc.method))
            except asyncio.CancelledError:
                if task_is_cancelled():
                    raise
                if not self._closed:  # then the channel was closed under the call
                    self._transport.check_open()
                    raise
            else:
                if message is grpc.aio.EOF:
                    break
                self._received = True
                self._attempts.answered()
                return self._call.read(message)
        raise StopAsyncIteration

    async def _begin_again(self, failure: OnebaseError) -> None:
        if self._received:
            raise failure from None
        await self._transport.sleep(self._attempts.delay_after(failure))
        if not self._closed:
            self._stream = self._transport.begin(self._call, self._attempts.remaining())

    async def close(self) -> None:
        """Cancels the call; the iteration ends. Any task may call this, any number of times."""
        self._closed = True
        self._stream.cancel()

    async def __aenter__(self) -> AsyncStream[Result]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def task_is_cancelled() -> bool:
    """Whether somebody asked the current task to end: gRPC raises the same for a call that was cancelled under it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
