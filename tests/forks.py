"""Processes that begin in a fraction of the time: forked off one that has imported what they need.

    python -m forks MODULE …      imports the modules, then forks a child for each line of JSON on stdin

A child is a process like any other: it runs the ordinary command function with its arguments, is killed for real, and
shares nothing with its siblings but pages that nobody has written. Only imports happen before the fork: no channel, no
engine, no thread. Every fork is refused where the process has more than one thread, which tells of gRPC's core and of
torch's pools alike.

Children die with the process that forks, and that dies with the one that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import environment

SERVER_MODULES = ("onebase.client.cli", "onebase.server.commands", "onebase.server.app", "onebase.server.worker")
"""What `onebase serve` imports before it opens a base."""
COMMAND = "onebase.client.cli:main"
_PR_SET_PDEATHSIG = 1


class Forked:
    """A child of a fork server; what of subprocess.Popen tests need."""

    def __init__(self, pid: int, reap: Callable[[int], int]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._reap = reap
        self._ended = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status if it has ended; negative is the signal that ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; waits for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._reap(self.pid))
            os.close(self._ended)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it has not ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._ended, number)

    def kill(self) -> None:
        """As kill -9."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts processes of what the `modules` hold.

    Args:
        modules: imported before the first fork.
        log: takes what it writes itself.
    """

    def __init__(self, modules: Sequence[str] = SERVER_MODULES, log: Path | None = None) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        with (log or Path(os.devnull)).open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "forks", *modules],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
                env={**environment(), "PYTHONPATH": path},
            )  # fmt: skip
        self._ask({})

    def start(self, argv: Sequence[str], out: Path, target: str = COMMAND, **env: str) -> Forked:
        """Forks a child.

        Args:
            argv: its sys.argv.
            out: gets what it writes.
            target: MODULE:FUNCTION that it runs.
            env: set in it besides.
        """
        answer = self._ask({"argv": list(argv), "out": str(out), "target": target, "env": env})
        return Forked(answer["pid"], lambda pid: int(self._ask({"reap": pid})["status"]))

    def learn(self, argv: Sequence[str], folder: Path, until: Callable[[Forked], None]) -> int:
        """Has one child do its work until SIGTERM, and imports what that imported on the way; returns how much."""
        there = folder / "modules"
        child = self.start(argv, folder / "learned.log", FORKS_MODULES=str(there))
        until(child)
        child.send_signal(signal.SIGTERM)
        child.wait(60)
        return int(self._ask({"import": there.read_text().split()})["imported"])

    def close(self) -> None:
        """Ends it, and with it all children that still live."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "it has ended"}')
        if "error" in answer:
            raise RuntimeError(f"fork server: {answer['error']}")
        return answer


@contextmanager
def fork_server(modules: Sequence[str] = SERVER_MODULES, log: Path | None = None) -> Iterator[ForkServer]:
    """A fork server that ends with the block."""
    server = ForkServer(modules, log)
    try:
        yield server
    finally:
        server.close()


# -------------------------------------------------------------------------------------------- in the process that forks


def main() -> None:
    """Imports, then does what stdin says."""
    _die_with_parent()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "target" in request:
            answer = _fork(request)
        elif "reap" in request:
            answer = {"status": os.waitpid(request["reap"], 0)[1]}
        else:
            answer = {"imported": sum(map(_import, request.get("import", ())))}
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any]) -> dict[str, Any]:
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        return {"error": f"{len(threads)} threads are alive: something was initialised, and a fork would lose it"}
    pid = os.fork()
    if pid == 0:
        _child(request)
    return {"pid": pid}


def _child(request: dict[str, Any]) -> None:
    _die_with_parent()
    status = 70
    try:
        nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for old, new in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(old, new)
            if old != new:
                os.set_inheritable(new, True)
        os.close(nothing)
        os.close(out)
        os.environ.update(request["env"])
        tempfile.tempdir = None  # as the environment has it
        sys.argv = request["argv"]
        sys.orig_argv = [sys.executable, "-m", "onebase.client.cli", *sys.argv[1:]]  # for a server that replaces itself
        module, _, function = request["target"].partition(":")
        status = _status(getattr(importlib.import_module(module), function))
        if there := os.environ.get("FORKS_MODULES"):
            Path(there).write_text("\n".join(sorted(sys.modules)), encoding="utf-8")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _import(name: str) -> bool:
    if name in sys.modules or name == "__main__":
        return False
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        importlib.import_module(name)
        return True
    return False


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
