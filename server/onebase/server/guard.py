"""The outermost room: every call passes it going in, and every error going out.

grpc.aio sends str(exception) of an uncaught error to the client. Here such an error is logged under an opaque id
and the client sees only the id. Bytes that are no message of the method are refused as INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status as grpc_status  # type: ignore[import-untyped]

from onebase.server.errors import Internal, InvalidArgument, OnebaseError
from onebase.server.status import CODES, rpc_status

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any  # an aio handler; the stubs know only the synchronous ones
Gate = Callable[[], OnebaseError | None]


class Guard(grpc.aio.ServerInterceptor):
    """Turns errors into statuses, and calls away while the gate gives a reason to.

    Args:
        gate: asked before each call of onebase's own services; health and reflection always pass.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(  # noqa: D102
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        gate: Gate = self._gate if method.startswith("/onebase.") else lambda: None
        if handler.request_streaming:
            guarded = _guard_reflection if handler.response_streaming else _guard_upload
            return guarded(method, handler, gate)
        return (
            _guard_stream(method, handler, gate) if handler.response_streaming else _guard_unary(method, handler, gate)
        )


def _guard_unary(method: str, handler: Handler, gate: Gate) -> Handler:
    async def behavior(raw: bytes, context: Context) -> Any:
        async with _told(method, context):
            _pass(gate)
            return await handler.unary_unary(_parse(handler, raw), context)

    return grpc.unary_unary_rpc_method_handler(behavior, None, handler.response_serializer)


def _guard_stream(method: str, handler: Handler, gate: Gate) -> Handler:
    async def behavior(raw: bytes, context: Context) -> None:
        async with _told(method, context):
            _pass(gate)
            responses = handler.unary_stream(_parse(handler, raw), context)
            if not hasattr(responses, "__aiter__"):  # the health service writes to its context itself
                await responses
                return
            # Closed here and now: a client that goes away must not leave the generator's clean-up to the collector.
            async with contextlib.aclosing(responses):
                async for response in responses:
                    await context.write(response)

    return grpc.unary_stream_rpc_method_handler(behavior, None, handler.response_serializer)


def _guard_upload(method: str, handler: Handler, gate: Gate) -> Handler:
    async def behavior(raws: AsyncIterator[bytes], context: Context) -> Any:
        async with _told(method, context), contextlib.aclosing(_parsed(handler, raws)) as requests:
            _pass(gate)
            return await handler.stream_unary(requests, context)

    return grpc.stream_unary_rpc_method_handler(behavior, None, handler.response_serializer)


async def _parsed(handler: Handler, raws: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
    async for raw in raws:
        yield _parse(handler, raw)


def _guard_reflection(method: str, handler: Handler, _gate: Gate) -> Handler:
    async def behavior(requests: Any, context: Context) -> None:
        async with _told(method, context), contextlib.aclosing(handler.stream_stream(requests, context)) as responses:
            async for response in responses:
                await context.write(response)

    return grpc.stream_stream_rpc_method_handler(behavior, handler.request_deserializer, handler.response_serializer)


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


def _pass(gate: Gate) -> None:
    refusal = gate()
    if refusal is not None:
        raise refusal


@contextlib.asynccontextmanager
async def _told(method: str, context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of whatever comes out of the block, and logs one line."""
    began = time.monotonic()
    outcome = "OK"
    try:
        yield
    except OnebaseError as error:
        outcome = f"{CODES[type(error)].name} {error.reason}"
        await _abort(context, error)
    except asyncio.CancelledError:
        outcome = "CANCELLED"
        raise
    except Exception as error:
        if context.cancelled() or context.done():  # a write to a client that is gone fails in ways of its own
            outcome = "CANCELLED"
            raise asyncio.CancelledError from error
        opaque = secrets.token_hex(8)
        outcome = f"INTERNAL {opaque}"
        log.exception("error %s in %s", opaque, method)
        await _abort(context, Internal("INTERNAL", f"internal error {opaque}: the server's log has the story"))
    finally:
        log.debug("%s %s %.1f ms", method, outcome, (time.monotonic() - began) * 1000)


async def _abort(context: Context, error: OnebaseError) -> None:
    if context.cancelled() or context.done():
        raise asyncio.CancelledError from error
    await context.abort_with_status(grpc_status.to_status(rpc_status(error)))
