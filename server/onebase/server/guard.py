"""The outermost room: every call passes it going in, and every error going out.

grpc.aio sends str(exception) of an uncaught error to the client. Here such an error is logged under an opaque id
and the client sees only the id. Bytes that are no message of the method are refused as INVALID_ARGUMENT.

The order is fixed: who calls (`tokens`), whether calls are taken at all, and only then are the request's bytes read.
A stream whose client neither reads nor sends for too long is ended, and so is one whose token is no longer good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status as grpc_status  # type: ignore[import-untyped]

from onebase.server.audit import AuditLog, Record
from onebase.server.errors import Internal, InvalidArgument, OnebaseError, ResourceExhausted, Unimplemented
from onebase.server.identity import OPERATOR, Caller, caller, set_caller
from onebase.server.methods import ANY_TOKEN
from onebase.server.status import code_of, rpc_status
from onebase.server.unread import Unread

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # an aio handler; the stubs know only the synchronous ones
Gate = Callable[[], OnebaseError | None]
Admit = Callable[[str, Mapping[str, str | bytes]], Caller]

STREAM_IDLE_SECONDS = 60.0
_UNREAD = 10  # times as long as a stream may be idle its end may wait for somebody who reads it
LOOK_AGAIN_SECONDS = 10.0


def _anybody(_method: str, _metadata: Mapping[str, str | bytes]) -> Caller:
    return Caller(OPERATOR)


@dataclass
class _Visit:
    """A call that was let in."""

    record: Record
    ask: Callable[[], Caller]
    """Who makes it, while he may; raises from then on."""
    asked: float = 0.0

    def look(self) -> Caller:
        """Asks who makes the call.

        Raises:
            OnebaseError: he may not, or may no longer.
        """
        self.asked = time.monotonic()
        try:
            self.record.caller = self.ask()
        except OnebaseError as error:
            self.record.caller = error.who or self.record.caller
            raise
        return self.record.caller

    def look_again(self) -> None:
        """Asks anew where that was a while ago: a token may expire or be revoked while a stream goes on."""
        if time.monotonic() - self.asked >= LOOK_AGAIN_SECONDS:
            self.look()


class Guard(grpc.aio.ServerInterceptor):
    """Lets calls in or turns them away, and turns errors into statuses.

    Args:
        gate: asked before each call of onebase's own services whether calls are taken now; health and reflection
            always pass.
        admit: says who makes a call of this method with this metadata, or raises.
        audit: is told how each call ended.
        idle: seconds that a stream may wait for its client to read, or to send the next part of an upload.
    """

    def __init__(
        self, gate: Gate, admit: Admit = _anybody, audit: AuditLog | None = None, idle: float = STREAM_IDLE_SECONDS
    ) -> None:
        self._gate = gate
        self._admit = admit
        self._audit = audit or AuditLog(None)
        self._idle = idle
        self._unread = Unread(_UNREAD * idle)

    async def intercept_service(  # noqa: D102
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return self._unknown(method)
        if handler.request_streaming:
            return self._both_streams(method, handler) if handler.response_streaming else self._upload(method, handler)
        return self._stream(method, handler) if handler.response_streaming else self._unary(method, handler)

    def _unknown(self, method: str) -> Handler:
        """Of a method that is not there: who has no token is not even told that."""

        async def behavior(_raws: AsyncIterator[bytes], context: Context) -> None:
            async with self._call(method, context, ANY_TOKEN):
                raise Unimplemented(
                    "UNIMPLEMENTED", f"{method} is not there: use a method of onebase.v1, or a server that has it"
                )

        return grpc.stream_stream_rpc_method_handler(behavior)

    def _unary(self, method: str, handler: Handler) -> Handler:
        async def behavior(raw: bytes, context: Context) -> Any:
            async with self._call(method, context) as visit:
                visit.record.request = request = _parse(handler, raw)
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(behavior, None, handler.response_serializer)

    def _stream(self, method: str, handler: Handler) -> Handler:
        async def behavior(raw: bytes, context: Context) -> None:
            async with self._call(method, context) as visit:
                visit.record.request = request = _parse(handler, raw)
                responses = handler.unary_stream(request, context)
                if not hasattr(responses, "__aiter__"):  # the health service writes to its context itself
                    await responses
                    return
                await self._write_all(responses, context, visit)

        return grpc.unary_stream_rpc_method_handler(behavior, None, handler.response_serializer)

    def _upload(self, method: str, handler: Handler) -> Handler:
        async def behavior(raws: AsyncIterator[bytes], context: Context) -> Any:
            async with (
                self._call(method, context) as visit,
                contextlib.aclosing(self._parsed(handler, raws, visit)) as requests,
            ):
                return await handler.stream_unary(requests, context)

        return grpc.stream_unary_rpc_method_handler(behavior, None, handler.response_serializer)

    def _both_streams(self, method: str, handler: Handler) -> Handler:
        async def behavior(raws: AsyncIterator[bytes], context: Context) -> None:
            async with (
                self._call(method, context) as visit,
                contextlib.aclosing(self._parsed(handler, raws, visit)) as requests,
            ):
                await self._write_all(handler.stream_stream(requests, context), context, visit)

        return grpc.stream_stream_rpc_method_handler(behavior, None, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _call(self, method: str, context: Context, rule: str = "") -> AsyncIterator[_Visit]:
        """A call, once it is known who makes it and that calls are taken; `rule` is another method's to go by."""
        record = Record(method)
        async with _told(record, context, self._audit):
            metadata = dict(context.invocation_metadata() or ())
            visit = _Visit(record, lambda: self._admit(rule or method, metadata))
            set_caller(visit.look())
            if method.startswith("/onebase."):
                refusal = self._gate()
                if refusal is not None:
                    raise refusal
            yield visit

    async def _write_all(self, responses: AsyncGenerator[Any, None], context: Context, visit: _Visit) -> None:
        # Closed here and now: a client that goes away must not leave the generator's clean-up to the collector.
        async with contextlib.aclosing(responses):
            async for response in responses:
                visit.look_again()
                writing = asyncio.ensure_future(context.write(response))
                try:
                    read, _ = await asyncio.wait((writing,), timeout=self._idle)
                    if not read:
                        await responses.aclose()  # what makes more of them ends now
                        await self._unread.gone(caller().tenant, writing)
                    if writing.done():
                        await writing
                except grpc.aio.InternalError as error:  # the client is gone, and its context may not say so yet
                    raise asyncio.CancelledError from error
                finally:
                    writing.cancel()  # means nothing to one that is done
                if not read:
                    raise ResourceExhausted(
                        "SLOW_CONSUMER",
                        f"nothing was read for {self._idle:g} s, and the stream was ended: read as it comes, or ask "
                        "for less at once",
                        retry_after=1.0,
                    )

    async def _parsed(self, handler: Handler, raws: AsyncIterator[bytes], visit: _Visit) -> AsyncGenerator[Any, None]:
        waiting = aiter(raws)
        while True:
            try:
                async with asyncio.timeout(self._idle):
                    raw = await anext(waiting)
            except StopAsyncIteration:
                visit.look()  # what came is only now made use of
                return
            except TimeoutError:
                raise ResourceExhausted(
                    "SLOW_PRODUCER",
                    f"nothing came for {self._idle:g} s, and the stream was ended: send it again, without pauses",
                    retry_after=1.0,
                ) from None
            visit.look_again()
            message = _parse(handler, raw)
            if visit.record.request is None:
                visit.record.request = message
            yield message


def _parse(handler: Handler, raw: bytes) -> Any:
    if handler.request_deserializer is None:
        return raw
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        raise InvalidArgument(
            "MALFORMED_MESSAGE",
            f"the {len(raw)} bytes received are not this method's request: use the client, or stubs of onebase.v1",
        ) from None


@contextlib.asynccontextmanager
async def _told(record: Record, context: Context, audit: AuditLog) -> AsyncIterator[None]:
    """Ends the call with the status of whatever comes out of the block; before that, it is logged and audited."""
    refusal: OnebaseError | None = None
    try:
        yield
    except OnebaseError as error:
        record.outcome, record.reason = code_of(error).name, error.reason
        refusal = error
    except asyncio.CancelledError:
        record.outcome = "CANCELLED"
        raise
    except NotImplementedError:  # of the generated classes: grpc's health service lacks a method here
        name = record.method.rpartition("/")[2]
        refusal = Unimplemented("UNIMPLEMENTED", f"{name} is not there: use another method of its service")
        record.outcome, record.reason = "UNIMPLEMENTED", refusal.reason
    except Exception as error:
        if context.cancelled() or context.done():  # a write to a client that is gone fails in ways of its own
            record.outcome = "CANCELLED"
            raise asyncio.CancelledError from error
        opaque = secrets.token_hex(8)
        record.outcome, record.reason = "INTERNAL", opaque
        log.exception("error %s in %s", opaque, record.method)
        refusal = Internal("INTERNAL", f"internal error {opaque}: the server's log has the story")
    finally:
        milliseconds = (time.monotonic() - record.began) * 1000
        log.debug("%s %s %.1f ms", record.method, f"{record.outcome} {record.reason}".rstrip(), milliseconds)
        audit.write(record)
    if refusal is not None:
        await _abort(context, refusal)


async def _abort(context: Context, error: OnebaseError) -> None:
    if context.cancelled() or context.done():
        raise asyncio.CancelledError from error
    await context.abort_with_status(grpc_status.to_status(rpc_status(error)))
