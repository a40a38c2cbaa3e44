"""The demo's child processes: each with a log, watched while it runs, and none left when the demo ends.

Children have sessions of their own, so that Ctrl-C reaches the demo alone, which then ends them in the right order:
the last one started first, each with SIGTERM and time to finish.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

TAIL_LINES = 15
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What children get besides the demo's own environment: small matrices gain nothing from threads that share cores."""


class ChildFailed(Exception):
    """A child ended with an error, or too early; the message has the last lines of its log."""


@dataclass(frozen=True)
class Child:
    """A process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    endless: bool

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]

    def failure(self, what: str) -> ChildFailed:
        """An error that says `what` happened and shows the log."""
        return ChildFailed("\n  ".join([f"{self.name} {what}; the end of {self.log}:", *self.tail()]))


class Children:
    """Starts children and, at the end of the `with` block, ends those that still run.

    Args:
        logs: directory of their logs.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, logs: Path, grace: float = 45.0) -> None:
        self._logs = logs
        self._grace = grace
        self._children: list[Child] = []

    def start(self, name: str, command: Sequence[str], *, endless: bool = False) -> Child:
        """Starts a command; an endless one is not expected to end by itself."""
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{name}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        child = Child(name, process, path, endless)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildFailed if any child ended with an error, or an endless one ended."""
        for child in self._children:
            code = child.process.poll()
            if code:
                raise child.failure(f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}")
            if code == 0 and child.endless:
                raise child.failure("ended, though it was still needed")

    def stop(self, child: Child) -> int:
        """Asks a child to end, waits for it, kills it if it takes too long, and returns its exit code."""
        self._children.remove(child)
        try:
            if child.running:
                child.process.send_signal(signal.SIGTERM)
            return child.process.wait(self._grace)
        except subprocess.TimeoutExpired:
            return _kill(child)
        except BaseException:  # Ctrl-C came again: no more patience
            _kill(child)
            raise

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._children:
                self.stop(self._children[-1])
        finally:
            for child in self._children:
                _kill(child)


def _kill(child: Child) -> int:
    """Ends a child, and what it has started itself, at once; returns its exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    return child.process.wait()


def wait_for_file(path: Path, child: Child, children: Children, seconds: float) -> str:
    """The text of a file that a child will write whole.

    Raises:
        ChildFailed: a child ended, or the file was not there in time.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        children.check()
        if time.monotonic() > deadline:
            raise child.failure(f"wrote no {path} in {seconds:g} seconds")
        time.sleep(0.05)
    return path.read_text(encoding="utf-8").strip()
