"""A server with a state directory, which is killed and started again on the same port."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

import pytest
from oracle.fixtures import FIXTURES
from support import RunningServer, start_server

Start = Callable[..., AbstractContextManager[RunningServer]]


@pytest.fixture
def port() -> int:
    """A port that stays the same over restarts."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory."""
    return tmp_path / "state"


@pytest.fixture
def start(port: int, state: Path) -> Start:
    """Starts a server with that state on that port."""
    flags = ("--state", str(state), "--threads", "1", "--reward", f"reward={FIXTURES / 'reward'}")
    return partial(start_server, FIXTURES / "base", *flags, port=port)


def died_of_sigkill(server: RunningServer) -> bool:
    """Whether it was killed, as a failpoint kills; waits for it."""
    return server.process.wait(60) == -signal.SIGKILL


def checkpoints(state: Path) -> set[str]:
    """What lies in the state's directory of checkpoints."""
    return {path.name for path in (state / "checkpoints").iterdir()}
