"""A real server in a process of its own, for tests.

It is forked off one that has imported what a server imports (`forks`): a start takes half a second in place of five.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forks import Forked, ForkServer

    Process = Forked | subprocess.Popen[bytes]

ONEBASE = (sys.executable, "-W", "error::UserWarning:onebase", "-m", "onebase.client.cli")
"""The `onebase` command of the environment that runs the tests."""

_ENGINE = (
    "onebase.server.engine",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
)
"""What a server imports on its way, besides."""


def environment() -> dict[str, str]:
    """What a child process gets: one thread, no hub, no colours."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"}


@dataclass
class RunningServer:
    """A server that answers at `address`."""

    address: str
    process: Process
    log: Path

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _fresh(argv: Sequence[str], log: Path, env: Mapping[str, str]) -> Process:
    with log.open("wb") as out:
        return subprocess.Popen([*ONEBASE, *argv[1:]], stdout=out, stderr=subprocess.STDOUT, env=env)


@functools.cache
def _forks() -> ForkServer:
    from forks import SERVER_MODULES, ForkServer

    server = ForkServer((*SERVER_MODULES, *_ENGINE))
    atexit.register(server.close)
    return server


@contextmanager
def start_server(
    model: Path | str, *flags: str, wait: float = 120.0, port: int = 0, failpoints: str = "", fresh: bool = False
) -> Iterator[RunningServer]:
    """Runs `onebase serve MODEL FLAGS` until the block ends, on a free port if none is given.

    With `failpoints` it fails as `onebase.server.failpoints` says. One that is `fresh` is not forked: Python begins in
    the environment as it is now.

    Raises:
        RuntimeError: it ended or did not serve in time; the message holds its exit status and its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder, "port"), Path(folder, "log")
        argv = ["onebase", "serve", str(model), *flags, "--port", str(port), "--port-file", str(port_file)]
        env = {**environment(), "ONEBASE_FAILPOINTS": failpoints}
        process: Process = _fresh(argv, log, env) if fresh else _forks().start(argv, log, **env)
        try:
            until = time.monotonic() + wait
            while not (port_file.exists() and port_file.read_text().strip()):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(
                        f"the server does not serve ({process.poll()}):\n{log.read_text(errors='replace')}"
                    )
                time.sleep(0.05)
            yield RunningServer(f"127.0.0.1:{port_file.read_text().strip()}", process, log)
        finally:
            process.kill()
            process.wait()
