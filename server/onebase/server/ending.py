"""From SIGTERM to the end: who is told to stop, how long each part of the end may take, and what it is called.

    SIGTERM  →  work in flight finishes  →  what is left is cut off  →  last checkpoints  →  the worker stops  →  end

Nothing here waits without a bound: the engine is watched until the end, and whoever tells the server to stop again has
it end at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from onebase.server.ports import WorkerLike
from onebase.server.successor import EXIT_CODE

log = logging.getLogger(__name__)

CUT_OFF = 75
"""Exit code of a server that was told to stop, and in which something did not end in time, or was told to stop again:
what was not durable by then is lost (EX_TEMPFAIL of sysexits.h)."""

LAST_STEP_SECONDS = 30.0
"""So long, or as long as the drain, a step of the engine may go on when its work has been cut off; it is not waited for
any longer than a step may go on for at all (`--stall-seconds`)."""

LAST_CHECKPOINTS_SECONDS = 600.0
"""So long the last checkpoints may take, all together."""

LOST_ANSWERS_SECONDS = 1.0
"""For answers on their way out of a server that was lost, or must end at once."""

_LOOK_SECONDS = 1.0
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_TURNS = 20


class Stopped(Exception):
    """The server was told to stop before it served."""


class Orders:
    """What the server is told by signals: to stop, and then to stop at once."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.at_once = asyncio.Event()

    def listen(self) -> None:
        """Hears SIGTERM and SIGINT from now on."""
        for number in _NUMBERS:
            asyncio.get_running_loop().add_signal_handler(number, self.stop)

    def stop(self) -> None:
        """The server is told to stop, the first time or again."""
        (self.at_once if self.stopping.is_set() else self.stopping).set()

    async def last_word(self) -> bool:
        """Whether it was told to stop, for one who goes on as another process otherwise.

        A signal that comes after this ends the process.
        """
        for number in _NUMBERS:
            signal.signal(number, _end)
        await turns()  # those that came before are still heard
        return self.stopping.is_set()

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Does some work, which is cancelled when the server is told to stop.

        Raises:
            Stopped: it was told so.
        """
        task = asyncio.ensure_future(work)
        await either(self.stopping.wait(), asyncio.wait((task,)))
        while not (task.done() or self.at_once.is_set()):  # one cancel ends one adapter; then the next one comes
            task.cancel()
            await asyncio.wait((task,), timeout=0.1)
        if self.stopping.is_set():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                log.info("told to stop while adapters were loaded: %s", error)
            raise Stopped
        task.result()


class Watch:
    """Looks at the engine until the server ends, and gives it up where a step goes on for too long.

    Args:
        worker: has the engine.
        most: seconds that a step may go on; 0 is any time.
    """

    def __init__(self, worker: WorkerLike, most: float) -> None:
        self._worker = worker
        self._most = most
        self._ending = False
        self.lost = asyncio.Event()
        """Set when the engine is lost."""
        self.gave_up = False
        """Whether it was given up for the end of the server; otherwise it crashed."""

    async def run(self, each: Callable[[], None], look: Callable[[float], Awaitable[None]]) -> None:
        """Looks again and again.

        Args:
            each: done before each look, until the server ends.
            look: is told for how long the step under way has gone on.
        """
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not self._ending:
                try:
                    each()
                except Exception:  # whatever it is, a crash must still be noticed
                    log.exception("sessions could not be swept")
            seconds = self._worker.stuck_seconds()
            if self._most and seconds > self._most:
                self.give_up(f"a step went on for {seconds:.0f} s", crash=not self._ending)
            if self._worker.lost():
                self.lost.set()
            else:
                await look(seconds)

    def end(self, most: float) -> None:
        """From now on the server ends: nothing but the engine is looked after, and a step may go on for so long."""
        self._ending = True
        self._most = min(most, self._most or most)

    def give_up(self, why: str, *, crash: bool = False) -> None:
        """Takes the engine for lost."""
        if not self._worker.lost():
            self.gave_up = not crash
            self._worker.abandon(why)

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        if self.gave_up:
            return CUT_OFF
        return EXIT_CODE if self._worker.lost() else 0


async def either(*waits: Awaitable[Any]) -> None:
    """Returns when one of them has ended; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def in_time(work: Awaitable[None], seconds: float) -> bool:
    """Whether some work ended within so long; it is not cancelled otherwise, since that may take as long again."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task,), timeout=seconds)
    if task.done():
        task.result()
    return task.done()


async def turns() -> None:
    """Lets the event loop take up all that has happened by now: an answer passes through a few of its turns."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def leave(code: int) -> NoReturn:
    """Ends the process, whatever its threads are at."""
    log.critical("the server was cut off, and ends with exit code %d: what is not durable is lost", code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end(_number: int, _frame: FrameType | None) -> None:
    leave(EXIT_CODE)
