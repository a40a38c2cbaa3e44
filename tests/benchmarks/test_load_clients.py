"""The clients of a run under load: no call of theirs goes unrecorded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from random import Random
from typing import Any

import grpc
from load_clients import REFUSED, UNFINISHED, Client, Refused

Line = tuple[str, str, float, int, int, str]


def recorded(send: Any, *, obey: bool = True, seconds: float = 0.2) -> list[Line]:
    """What a client writes down of one operation whose calls go as `send` does, and which is cut off after a while."""
    lines: list[Line] = []

    async def run() -> None:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            client = Client("red", "", 0, channel, Random(0), lambda *line: lines.append(line))
            client._send = send  # type: ignore[method-assign]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await client.act("Logprob", obey=obey)

    asyncio.run(run())
    return lines


async def hang(method: Any, request: Any) -> None:
    await asyncio.sleep(60)


async def refuse(method: Any, request: Any) -> None:
    raise Refused(0.01)


async def answer(method: Any, request: Any) -> None:
    return None


def test_a_call_that_nobody_waits_for_any_more_is_recorded_with_the_time_until_then() -> None:
    began = time.monotonic()
    ((tenant, method, seconds, tokens, refusals, error),) = recorded(hang)
    assert (tenant, method, tokens, refusals, error) == ("red", "Logprob", 0, 0, UNFINISHED)
    assert 0.15 < seconds <= time.monotonic() - began


def test_so_is_one_that_is_refused_again_and_again() -> None:
    ((_, _, _, _, refusals, error),) = recorded(refuse)
    assert refusals > 1
    assert error == UNFINISHED


def test_what_obeys_nothing_is_refused_once() -> None:
    ((_, _, _, tokens, refusals, error),) = recorded(refuse, obey=False)
    assert (tokens, refusals, error) == (0, 1, REFUSED)


def test_an_answer_is_no_error_and_has_its_tokens() -> None:
    ((_, _, _, tokens, refusals, error),) = recorded(answer)
    assert tokens > 0
    assert (refusals, error) == (0, "")
