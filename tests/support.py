"""A real server in a process of its own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ONEBASE = (sys.executable, "-W", "error::UserWarning:onebase", "-m", "onebase.client.cli")
"""The `onebase` command of the environment that runs the tests."""


def environment() -> dict[str, str]:
    """What a child process gets: one thread, no hub, no colours."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"}


@dataclass
class RunningServer:
    """A server that answers at `address`."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def start_server(
    model: Path | str, *flags: str, wait: float = 120.0, port: int = 0, failpoints: str = ""
) -> Iterator[RunningServer]:
    """Runs `onebase serve MODEL FLAGS` until the block ends, on a free port if none is given.

    With `failpoints` it fails as `onebase.server.failpoints` says.

    Raises:
        RuntimeError: it ended or did not serve in time; the message holds its exit status and its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder, "port"), Path(folder, "log")
        command = [*ONEBASE, "serve", str(model), *flags, "--port", str(port), "--port-file", str(port_file)]
        env = {**environment(), "ONEBASE_FAILPOINTS": failpoints}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
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
