"""The tokenizer on a thread of its own, so that a long text never holds up the event loop.

One text is one turn on that thread, and tenants take turns by the time that their texts took: a request with thousands
of texts and one with a single text take turns, and so do a tenant's hundred requests and another's one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from onebase.server.identity import caller
from onebase.server.jobs import Message, Tokens
from onebase.server.ports import TextLike
from onebase.server.turns import Owner, TenantQueue

T = TypeVar("T")

_JOIN_SECONDS = 5.0
_LEAST_SECONDS = 1e-5  # of a turn: one that takes no time would have no end


@dataclass(eq=False)
class _Turn:
    """A text that waits."""

    encode: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    ids: asyncio.Future[Any]

    def take(self) -> None:
        """On the thread: encodes it, unless nobody waits for it any more."""
        if self.ids.cancelled():
            return
        try:
            result: Any = self.encode()
        except Exception as error:
            self._tell(partial(self.ids.set_exception, error))
        else:
            self._tell(partial(self.ids.set_result, result))

    def drop(self) -> None:
        """It will not come."""
        self._tell(self.ids.cancel)

    def _tell(self, resolve: Callable[[], object]) -> None:
        def tell() -> None:
            if not self.ids.done():
                resolve()

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(tell)


class Texts:
    """Encodes texts, one at a time, off the event loop."""

    def __init__(self, text: TextLike) -> None:
        self._text = text
        self._waiting: TenantQueue[_Turn] = TenantQueue()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tokenizer", daemon=True)
        self._thread.start()

    async def prompt(self, text: str) -> Tokens:
        """Token ids of a prompt, with the tokenizer's special tokens."""
        return await self._turn(lambda: self._text.encode_prompt(text))

    async def completion(self, text: str) -> Tokens:
        """Token ids of a completion, without special tokens."""
        return await self._turn(lambda: self._text.encode_completion(text))

    async def joined(self, prompt: str, completion: str) -> Tokens:
        """Token ids of prompt and completion as one string, with special tokens."""
        return await self._turn(lambda: self._text.encode_joined(prompt, completion))

    async def chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> Tokens:
        """Token ids of a conversation, as `TextLike.encode_chat`; ValueError if the template refuses it."""
        return await self._turn(lambda: self._text.encode_chat(messages, generation_prompt=generation_prompt))

    async def reply(self, prompt: Sequence[Message], completion: Sequence[Message]) -> Tokens | None:
        """Token ids of what the chat template adds for a completion, as `TextLike.encode_reply`."""
        return await self._turn(lambda: self._text.encode_reply(prompt, completion))

    def close(self) -> None:
        """Ends the thread; texts that still wait are dropped."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        for turn in self._waiting.tasks:
            turn.drop()
        self._thread.join(_JOIN_SECONDS)  # a text that takes longer than that keeps no server

    async def _turn(self, encode: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        ids: asyncio.Future[T] = loop.create_future()
        with self._wake:
            self._waiting.push(Owner(caller().tenant, ""), _Turn(encode, loop, ids))
            self._wake.notify()
        return await ids

    def _run(self) -> None:
        while (owner := self._next()) is not None:
            turn, began = self._waiting.first(owner), time.perf_counter()
            turn.take()
            with self._wake:
                self._waiting.charge(owner, max(_LEAST_SECONDS, time.perf_counter() - began))
                self._waiting.remove(owner, turn)

    def _next(self) -> Owner | None:
        """Whose turn it is; None when this has ended."""
        with self._wake:
            while not self._closed and not len(self._waiting):
                self._wake.wait()
            return None if self._closed else self._waiting.next()
