"""Processes beside this one: a real server, and peers that make one PPO iteration whenever they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from measure import NotMeasured, status_bytes

from onebase.server.app import Report, open_parts, running
from onebase.server.config import ServerConfig

PEERS = Path(__file__).resolve().parent / "peers"
START_SECONDS = 180.0
END_SECONDS = 10.0


def environment() -> dict[str, str]:
    """What a child process gets: one thread, no hub, no colours."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_COLOR": "1",
    }


@dataclass(frozen=True)
class RunningServer:
    """A server in a process of its own."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def served(model: Path, *flags: str) -> Iterator[RunningServer]:
    """Runs `onebase serve MODEL FLAGS` on one thread and a free port until the block ends.

    Raises:
        RuntimeError: it ended or did not serve in time; the message holds its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder, "port"), Path(folder, "log")
        command = [sys.executable, "-m", "onebase.client.cli", "serve", str(model), "--threads", "1", *flags]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--port", "0", "--port-file", str(port_file)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        try:
            until = time.monotonic() + START_SECONDS
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server does not serve:\n{log.read_text(errors='replace')}")
                time.sleep(0.05)
            yield RunningServer(f"127.0.0.1:{port_file.read_text().strip()}", process.pid)
        finally:
            process.terminate()
            _end(process)


@contextlib.contextmanager
def served_here(config: ServerConfig) -> Iterator[str]:
    """The same server on threads of this process, so that its parts can be timed; gives its address."""
    parts = open_parts(config)
    ports: list[int] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def is_ready(port: int) -> None:
        ports.append(port)
        ready.set()

    async def serve() -> None:
        async with running(parts, config, Report(ready=is_ready)):
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="served-here")
    thread.start()
    try:
        ready.wait()
        if not ports:
            raise RuntimeError("the server in this process did not come up")
        yield f"127.0.0.1:{ports[0]}"
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@dataclass(frozen=True)
class Iteration:
    """What one iteration cost a peer's process."""

    wall: float
    cpu: float


class Peer:
    """A program that makes an iteration for every line "go", and then writes a line of JSON about it.

    Args:
        python: the interpreter to run it with.
        script: a file in peers/.
        arguments: the program's.
    """

    def __init__(self, python: Path | str, script: str, arguments: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._script = script
        self._process = subprocess.Popen(
            [str(python), str(PEERS / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(),
            text=True,
        )
        self._answer()  # it writes a first line when it is ready

    def go(self) -> None:
        """Begins an iteration."""
        if self._process.stdin is None:
            raise RuntimeError(f"{self._script} has no stdin")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> Iteration:
        """Waits for the iteration that was begun."""
        answer = self._answer()
        return Iteration(float(answer["wall"]), float(answer["cpu"]))

    def iterate(self) -> Iteration:
        """One iteration."""
        self.go()
        return self.result()

    def peak_bytes(self) -> int:
        """Most resident memory so far; not getrusage's, which begins with what this process held at the fork."""
        return status_bytes("VmHWM", self._process.pid)

    def close(self) -> None:
        """Ends the program: it stops when there are no more lines to read."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        _end(self._process)
        self._log.close()

    def _answer(self) -> dict[str, float]:
        if self._process.stdout is None:
            raise RuntimeError(f"{self._script} has no stdout")
        for line in self._process.stdout:  # libraries may write lines of their own
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        self._log.seek(0)
        told = self._log.read().decode(errors="replace").strip().splitlines()
        raise NotMeasured(f"{self._script} ended: {told[-1] if told else 'it said nothing'}")


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Waits for a process that was told to end, asks it again, and makes it."""
    for ask in (process.terminate, process.kill):
        try:
            process.wait(END_SECONDS)
            break
        except subprocess.TimeoutExpired:
            ask()
    process.wait()
