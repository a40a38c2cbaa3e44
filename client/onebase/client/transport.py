"""Sends calls over a channel: deadlines, retries and the translation of errors, for one call and for streams."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import grpc

from onebase.client.attempts import Attempts
from onebase.client.channel import Security, open_channel
from onebase.client.codec.rpc import Call
from onebase.client.errors import CancelledError, OnebaseError, translate
from onebase.client.retry import Backoff
from onebase.client.waits import OnWait, Waits

Result = TypeVar("Result")
Answer = TypeVar("Answer")
Item = TypeVar("Item", covariant=True)
CLIENT_CLOSED = "CLIENT_CLOSED"
"""Reason of the errors of a client that was closed here."""
Seconds = TypeVar("Seconds", bound=float | None)


class Transport:
    """A channel and the rules of its calls. Any number of threads may use it.

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
        self._channel = open_channel(target, security)
        self._closed = threading.Event()

    def run(self, call: Call[Result], timeout: float | None = None) -> Result:
        """Sends a call and reads its answer.

        Raises:
            OnebaseError: the last attempt's failure.
        """
        send = self._sender(call)
        attempts = self.attempts(call, timeout)
        while True:
            try:
                answer = self.invoke(send, attempts.remaining())
            except grpc.RpcError as error:
                self.sleep(attempts.delay_after(translate(error, call.rpc.method)))
            else:
                attempts.answered()
                return call.read(answer)

    def _sender(self, call: Call[Any]) -> Callable[[float], Any]:
        """What sends one attempt of a call within so many seconds."""
        path, read, body = call.rpc.path, call.rpc.answer.FromString, call.body
        if body is None:
            send = self._channel.unary_unary(path, request_serializer=_serialize, response_deserializer=read)
            return lambda remaining: send(call.request, timeout=remaining, metadata=self._metadata)
        upload = self._channel.stream_unary(path, request_serializer=_serialize, response_deserializer=read)
        return lambda remaining: upload(
            itertools.chain((call.request,), body()), timeout=remaining, metadata=self._metadata
        )

    def collect(self, call: Call[Result], timeout: float | None = None) -> list[Result]:
        """Sends a call whose answer is a stream, and reads all of it; a failure at any time begins it anew.

        Raises:
            OnebaseError: the last attempt's failure.
        """
        attempts = self.attempts(call, timeout)
        while True:
            stream = self.begin(call, attempts.remaining())
            try:
                messages = [call.read(message) for message in stream]
            except grpc.RpcError as error:
                failure = translate(error, call.rpc.method)
            else:
                attempts.answered()
                return messages
            finally:
                stream.cancel()
            self.sleep(attempts.delay_after(failure))

    def stream(self, call: Call[Result], timeout: float | None = None) -> Stream[Result]:
        """Sends a call whose answer is a stream, and gives it to be read."""
        return Stream(self, call, timeout)

    def begin(self, call: Call[Any], remaining: float | None) -> ServerStream[Any]:
        """Starts one attempt of a streaming call; None has no deadline, and waits for a server as long as it takes."""
        send = self._channel.unary_stream(
            call.rpc.path, request_serializer=_serialize, response_deserializer=call.rpc.answer.FromString
        )
        endless = remaining is None
        return self.invoke(
            lambda seconds: send(call.request, timeout=seconds, metadata=self._metadata, wait_for_ready=endless),
            remaining,
        )

    def attempts(self, call: Call[Any], timeout: float | None) -> Attempts:
        """The attempts of one call, of which the clock starts now."""
        seconds = self._timeout if timeout is None else timeout
        return Attempts(self.backoff, repeatable=call.rpc.repeatable, seconds=seconds, waits=self._waits)

    def invoke(self, send: Callable[[Seconds], Answer], remaining: Seconds) -> Answer:
        """Sends once, unless the transport was closed."""
        try:
            return send(remaining)
        except ValueError:  # what gRPC raises on a closed channel
            if self._closed.is_set():
                raise CancelledError("the client is closed", reason=CLIENT_CLOSED) from None
            raise

    def sleep(self, seconds: float) -> None:
        """Waits; CancelledError if the transport is closed meanwhile."""
        if self._closed.wait(seconds):
            raise CancelledError("the client was closed", reason=CLIENT_CLOSED)

    def close(self) -> None:
        """Cancels what is under way and closes the channel; may be called twice."""
        self._closed.set()
        self._channel.close()


class ServerStream(Protocol[Item]):
    """What is used of gRPC's own stream."""

    def __iter__(self) -> Iterator[Item]:
        """Itself."""

    def __next__(self) -> Item:
        """The next message."""

    def cancel(self) -> bool:
        """Ends the call."""


class Stream(Generic[Result]):
    """Iterates over what a server streams. Closing it, or leaving its `with` block, cancels the call.

    A failure is retried as long as nothing was received: from then on, a second attempt could contradict the first.
    """

    def __init__(self, transport: Transport, call: Call[Result], timeout: float | None) -> None:
        self._transport = transport
        self._call = call
        self._attempts = transport.attempts(call, timeout)
        self._closed = False
        self._received = False
        self._stream = transport.begin(call, self._attempts.remaining())

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        while not self._closed:
            try:
                message = next(self._stream)
            except grpc.RpcError as error:
                if not self._closed:  # else this is the echo of close()
                    self._begin_again(translate(error, self._call.rpc.method))
            else:
                self._received = True
                self._attempts.answered()
                return self._call.read(message)
        raise StopIteration

    def _begin_again(self, failure: OnebaseError) -> None:
        if self._received:
            raise failure from None
        self._transport.sleep(self._attempts.delay_after(failure))
        self._stream = self._transport.begin(self._call, self._attempts.remaining())
        if self._closed:
            self._stream.cancel()

    def close(self) -> None:
        """Cancels the call; the iteration ends. Any thread may call this, any number of times."""
        self._closed = True
        self._stream.cancel()

    def __enter__(self) -> Stream[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def new_request_id() -> str:
    """Names one change; sent again with each retry of it, so that the server makes the change once."""
    return uuid.uuid4().hex


def _serialize(request: Any) -> bytes:
    data: bytes = request.SerializeToString()
    return data
