"""A server of one's own, on this machine, for as long as the script runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence as SequenceABC
from pathlib import Path

from onebase.client.errors import UnavailableError

_ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}", re.ASCII)
_SECONDS = 1800.0  # a large model takes its time


def is_address(target: str) -> bool:
    """Whether this is a server's host:port rather than a model's id or directory."""
    return _ADDRESS.fullmatch(target) is not None and not Path(target).exists()


class LocalServer:
    """`onebase serve` in a process of its own; ends with this object, or with the program.

    Attributes:
        address: host and port.
        log: where it writes what it does.
    """

    def __init__(self, model: str, flags: SequenceABC[str] = ()) -> None:
        """Starts it and waits until it serves.

        Raises:
            ImportError: the server is not installed.
            UnavailableError: it ended before it served; the message holds the end of its log.
        """
        if not (importlib.util.find_spec("onebase.server") and importlib.util.find_spec("torch")):
            raise ImportError(
                f"{model!r} is no server's address, and to serve it here the server must be installed: "
                "pip install 'onebase[server]', or give host:port of a server that runs"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="onebase-"))
        self.log, port_file = self._folder / "log", self._folder / "port"
        command = [sys.executable, "-m", "onebase.client.cli", "serve", model, *flags]
        command += ["--root", str(self._folder / "adapters"), "--port", "0", "--port-file", str(port_file)]
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self._finalizer = weakref.finalize(self, _stop, self._process, self._folder)
        until = time.monotonic() + _SECONDS
        while not (port_file.exists() and port_file.read_text(encoding="utf-8").strip()):
            if self._process.poll() is not None or time.monotonic() > until:
                said = self.log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
                self.close()
                raise UnavailableError(f"the server of {model!r} did not start:\n{said}")
            time.sleep(0.05)
        self.address = f"127.0.0.1:{port_file.read_text(encoding='utf-8').strip()}"

    def close(self) -> None:
        """Ends it; may be called twice."""
        self._finalizer()


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
