"""A server whose engine is lost is replaced by a fresh one: the same process, command line and port, from its state.

    answer what is in flight  →  exec  →  open the base  →  take up the state  →  serve

Whoever talks to it sees a pause, as after any restart. A crash that comes back is not repeated for ever: after MOST
restarts WITHIN so many seconds, and where nothing outlives the process, it ends with EXIT_CODE instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from onebase.server import failpoints
from onebase.server.config import ServerConfig

log = logging.getLogger(__name__)

EXIT_CODE = 70
"""Of a server whose engine crashed, and which does not start again by itself (EX_SOFTWARE of sysexits.h)."""

MOST, WITHIN = 3, 600.0

_VARIABLE = "ONEBASE_RESTARTS"


@dataclass(frozen=True)
class Restarts:
    """What a server knows of those whose place it took."""

    times: tuple[float, ...] = ()
    """When they crashed, on time.monotonic's clock, which goes on."""
    port: int = 0
    """On which they served; 0 if there were none."""

    @classmethod
    def inherited(cls) -> Restarts:
        """What this process was left by the one before, which no child of it shall see."""
        left = json.loads(os.environ.pop(_VARIABLE, "{}"))
        return cls(tuple(left.get("times", ())), left.get("port", 0))

    def keep_port(self, config: ServerConfig) -> ServerConfig:
        """The settings, where a free port was asked for with the one that clients know."""
        return dataclasses.replace(config, port=self.port) if self.port and not config.port else config

    def one_more(self, port: int, now: float) -> Restarts | None:
        """With a crash now; None if there were too many."""
        recent = tuple(one for one in self.times if now - one < WITHIN)
        return None if len(recent) >= MOST else Restarts((*recent, now), port)


def end(config: ServerConfig, restarts: Restarts, ticket: str, port: int) -> NoReturn:
    """Ends a server whose engine crashed: in a fresh one in its place, or for good. No thread of it is waited for.

    Args:
        config: its settings.
        restarts: what it was left.
        ticket: under which the log says why.
        port: on which it served.
    """
    if config.state is None:
        _exit(
            f"the engine crashed, logged as {ticket}, and nothing outlives this server: start it again, with --state "
            "DIR to lose nothing and to have it start again by itself"
        )
    more = restarts.one_more(port, time.monotonic())
    if more is None:
        _exit(
            f"the engine crashed, logged as {ticket}, and did so {MOST} times before within {WITHIN / 60:g} minutes: "
            f"look at the log, and start it again; what is durable is in {config.state.path}"
        )
    log.critical(
        "the engine crashed, logged as %s: starting again (%d of %d restarts within %g minutes)",
        ticket,
        len(more.times),
        MOST,
        WITHIN / 60,
    )
    os.environ[_VARIABLE] = json.dumps(dataclasses.asdict(more))
    failpoints.carry_over()
    _flush()
    _leave_no_files_open()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        _exit(f"the engine crashed, logged as {ticket}, and {sys.executable} cannot be run: {error.strerror}")


def _exit(why: str) -> NoReturn:
    log.critical("%s", why)
    _flush()
    os._exit(EXIT_CODE)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _leave_no_files_open() -> None:
    """Whatever opened them, sockets and locks end with this server."""
    listing = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
    for name in os.listdir(listing):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(int(name), False)
