"""Child processes of a demo: each with a log of its own, and none left when the demo ends, however it ends."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


class ChildFailed(Exception):
    """A child ended with an error; the message holds the end of its log."""


@dataclass
class Child:
    """A running process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def running(self) -> bool:
        """Whether it still runs.

        Raises:
            ChildFailed: it ended with an error.
        """
        code = self.process.poll()
        if code:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise ChildFailed(f"{self.name} ended with code {code}:\n{tail}\n(all of it: {self.log})")
        return code is None

    def stop(self, seconds: float = 30.0) -> None:
        """Asks it to end, and makes it end if it does not."""
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Children:
    """A context in which processes run; those that still run at its end are stopped, the newest first.

    Args:
        logs: directory for their logs.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Starts a process whose output goes to NAME.log."""
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def wait(self, child: Child, tick: Callable[[], None], every: float = 0.3) -> None:
        """Waits for one to end, looking after all the others, and calls `tick` meanwhile.

        Raises:
            ChildFailed: any of them ended with an error.
        """
        while child.running():
            for other in self._children:
                other.running()
            tick()
            time.sleep(every)

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.stop()
