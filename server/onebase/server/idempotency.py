"""A call that changes something, named by its client's request_id, happens once.

The same id with the same payload gets the stored response, or waits for the call that is under way; with another
payload it is refused. Failed calls are not stored: they changed nothing, so a retry is a new try.

Each call runs in a task of its own. A client that goes away stops it only if no other waits for the same answer,
and a call that could not be stopped any more is stored all the same: its client's retry finds the answer.

Where a call's effect outlives the process, its answer does too (`record`, `restore`).

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from onebase.server.answers import Answers, Key, Stored
from onebase.server.errors import Aborted, Cancelled, DeadlineExceeded, InvalidArgument
from onebase.server.identity import OPERATOR, caller
from onebase.server.names import name_of
from onebase.server.store import ResponseRow
from onebase.v1 import adapters_pb2, training_pb2, types_pb2

M = TypeVar("M", bound=Message)

MAX_REQUEST_ID = 128

_RESPONSES: Mapping[str, type[Message]] = {
    "CreateAdapter": types_pb2.Adapter,
    "LoadAdapter": types_pb2.Adapter,
    "UploadAdapter": types_pb2.Adapter,
    "DeleteAdapter": adapters_pb2.DeleteAdapterResponse,
    "SaveAdapter": adapters_pb2.SaveAdapterResponse,
    "CheckpointAdapter": adapters_pb2.CheckpointAdapterResponse,
    "OptimStep": training_pb2.OptimStepResponse,
}
"""The methods whose answers outlive the process."""


@dataclass(eq=False)
class _Call:
    digest: bytes
    task: asyncio.Task[Any]
    waiters: int = 0


@dataclass(frozen=True)
class _Applied:
    digest: bytes
    response: Message
    finish: Callable[[], Awaitable[None]]

    async def end(self) -> Any:
        await self.finish()
        return self.response


class Idempotency:
    """Responses by request_id.

    Args:
        capacity: most responses kept of each tenant, of what outlives the process and of the rest; the one not asked
            for the longest goes first.
        capacity_bytes: most bytes of each of these of all tenants together; of what had to go for that it is still
            known that it was done.
    """

    def __init__(self, capacity: int = 4096, capacity_bytes: int = 64 * 2**20) -> None:
        self._capacity = capacity
        self._lasting = Answers(capacity, capacity_bytes)  # of what outlives the process; they are small
        self._passing = Answers(capacity, capacity_bytes)
        self._applied: OrderedDict[Key, _Applied] = OrderedDict()
        self._running: dict[Key, _Call] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def restore(self, row: ResponseRow) -> None:
        """Knows what the server that was here before has answered."""
        kind = _RESPONSES[name_of(row.method)]
        self._lasting.put((row.session, row.method, row.request), Stored(row.digest, kind, row.response))

    def applied(self, method: str, request: Message, response: Message, finish: Callable[[], Awaitable[None]]) -> None:
        """Says, inside `work`, that the change is made: if `work` fails now, a repeated call only has to `finish`."""
        if request_id := _request_id(request):
            key = (request.session_id, of_tenant(method), request_id)  # type: ignore[attr-defined]
            self._applied[key] = _Applied(digest_of(request), response, finish)
            if len(self._applied) > self._capacity:
                self._applied.popitem(last=False)

    async def run(self, method: str, request: Message, work: Callable[[], Awaitable[M]]) -> M:
        """The response of `work`, or of the call of the same request_id that came before.

        Args:
            method: the RPC's name.
            request: has session_id and request_id; without an id, nothing is stored or looked up.
            work: makes the response; its errors mean that nothing was changed.

        Raises:
            InvalidArgument: BAD_REQUEST_ID.
            Aborted: REQUEST_ID_REUSED with another payload.
            OnebaseError: the work's own.
        """
        request_id = _request_id(request)
        if not request_id:
            return cast(M, await self._wait(_Call(b"", self._start(work))))
        check_request_id(request_id)
        key = (request.session_id, method, request_id)  # type: ignore[attr-defined]
        digest = digest_of(request)
        while True:
            stored = self._kept(method).get(key)
            if stored is not None:
                check_digest(stored.digest, digest, request_id)
                if stored.data is None:
                    raise _forgotten(name_of(method), request_id)
                return cast(M, stored.response)
            applied = self._applied.get(key)
            if applied is not None:
                check_digest(applied.digest, digest, request_id)
            call = self._running.get(key)
            mine = call is None
            if call is None:
                call = self._running[key] = _Call(digest, self._start(applied.end if applied else work))
                call.task.add_done_callback(functools.partial(self._finish, key, digest))
            check_digest(call.digest, digest, request_id)
            try:
                return cast(M, await self._wait(call))
            except (Cancelled, DeadlineExceeded, asyncio.CancelledError):
                # The other client's cancel or deadline is not this one's: try again, as the first this time.
                if mine or not call.task.done() or _cancelling():
                    raise

    def _start(self, work: Callable[[], Awaitable[M]]) -> asyncio.Task[M]:
        async def run() -> M:
            return await work()

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_retrieve)
        return task

    async def _wait(self, call: _Call) -> Any:
        call.waiters += 1
        try:
            await asyncio.wait((call.task,))  # unlike `await task`, a cancel here does not cancel the task
        finally:
            call.waiters -= 1
            if not call.waiters:
                call.task.cancel()  # means nothing to a task that is done
        return call.task.result()

    def _kept(self, method: str) -> Answers:
        """Where its answers are: those of gradients, which are large, must not push out those of steps."""
        return self._lasting if name_of(method) in _RESPONSES else self._passing

    def _finish(self, key: Key, digest: bytes, task: asyncio.Task[Any]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._applied.pop(key, None)
        response: Message = task.result()
        self._kept(key[1]).put(key, Stored(digest, type(response), response.SerializeToString()))


def record(method: str, request: Message, response: Message) -> ResponseRow | None:
    """What a call was answered, for the store; None for a call without a request_id."""
    request_id = _request_id(request)
    if not request_id:
        return None
    session: str = request.session_id  # type: ignore[attr-defined]
    return ResponseRow(session, of_tenant(method), request_id, digest_of(request), response.SerializeToString())


def stamp(method: str, request: Message) -> str:
    """Tells a call from all others, also where it leaves its effect on a disk; "" for one without a request_id."""
    request_id = _request_id(request)
    if not request_id:
        return ""
    key = (of_tenant(method), request.session_id, request_id, digest_of(request).hex())  # type: ignore[attr-defined]
    return hashlib.sha256("\n".join(key).encode()).hexdigest()


def of_tenant(method: str) -> str:
    """A method's name for the caller: what another tenant was answered under the same request_id is not its to see."""
    tenant = caller().tenant
    return method if tenant == OPERATOR else f"{tenant}/{method}"


def digest_of(request: Message) -> bytes:
    """Tells a request from another under the same request_id."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def _request_id(request: Message) -> str:
    found: str = request.request_id  # type: ignore[attr-defined]
    return found


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Looks at the error of a task that nobody may be waiting for any more."""
    if not task.cancelled():
        task.exception()


def check_digest(known: bytes, digest: bytes, request_id: str) -> None:
    """Refuses a request_id that came before with another payload.

    Raises:
        Aborted: REQUEST_ID_REUSED.
    """
    if known != digest:
        raise Aborted(
            "REQUEST_ID_REUSED",
            f"request_id {request_id!r} came before with another payload: give each call an id of its own",
            field="request_id",
        )


def _forgotten(method: str, request_id: str) -> Aborted:
    return Aborted(
        "ANSWER_FORGOTTEN",
        f"{method} was done under request_id {request_id!r}, but its answer is no longer kept: others took its room",
        field="request_id",
    )


def check_request_id(request_id: str) -> None:
    """Refuses what is no request_id; "" is one.

    Raises:
        InvalidArgument: BAD_REQUEST_ID.
    """
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        raise InvalidArgument(
            "BAD_REQUEST_ID",
            f"request_id {request_id[:MAX_REQUEST_ID]!r} has {len(request_id)} characters: use at most "
            f"{MAX_REQUEST_ID}, all printable",
            field="request_id",
        )
