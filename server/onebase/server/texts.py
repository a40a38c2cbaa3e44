"""The tokenizer on a thread of its own, so that a long text never holds up the event loop.

One text is one turn on that thread: a request with thousands of texts and one with a single text take turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from onebase.server.jobs import Message, Tokens
from onebase.server.ports import TextLike

T = TypeVar("T")


class Texts:
    """Encodes texts, one at a time, off the event loop."""

    def __init__(self, text: TextLike) -> None:
        self._text = text
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

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
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _turn(self, encode: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)
