"""The process that reads files (`reading`), watched from outside: that it lives, stays small, and goes on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from fuzz.files import Files
from fuzz.findings import Findings
from support import environment

GROWTH = 512 * 2**20
"""Bytes that the process may have more than after its first inputs."""
READING_SECONDS, WAITING_SECONDS = 20.0, 180.0
"""A file that takes longer hangs: of the processor's time, and in all."""


class Reading(threading.Thread):
    """Has files read in a process of its own, which is watched."""

    def __init__(self, folder: Path, seed: int, count: int, findings: Findings, wholes: list[Files]) -> None:
        super().__init__(daemon=True)
        self._folder, self._seed, self._count, self._findings = folder, seed, count, findings
        self._progress = folder / "progress"
        for number, files in enumerate(wholes):
            place = folder / "wholes" / str(number)
            place.mkdir(parents=True)
            for name, data in files.items():
                (place / name).write_bytes(data)

    def run(self) -> None:
        """Reads all of them, beginning again behind one that ends the process."""
        first = 0
        while first < self._count:
            self._progress.write_text("")
            first = self._read(first)

    def again(self, number: int) -> None:
        """Reads one of them."""
        self._read(number)

    def _read(self, first: int) -> int:
        """Reads from here on; the number behind the last one that was read."""
        heard = self._folder / "told"
        arguments = {"seed": self._seed, "first": first, "count": self._count - first}
        places = {"wholes": self._folder / "wholes", "progress": self._progress, "place": self._folder / "place"}
        command = [sys.executable, "-m", "fuzz.reading"]
        command += [word for key, value in {**arguments, **places}.items() for word in (f"--{key}", str(value))]
        with heard.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment())
            problem = self._watch(process, first)
        for line in heard.read_text().splitlines():
            if line.startswith("{"):
                told = json.loads(line)
                if "codes" in told:
                    self._findings.codes["files"].update(told["codes"])
                else:
                    self._findings.add("files", seed=self._seed, **told)
        now = self._now(first)
        if problem is None and process.returncode:
            problem = f"crash: the process that reads files ended with {process.returncode}"
        if problem is not None:
            self._findings.add("files", problem, number=now, seed=self._seed)
            now += 1
        self._findings.by_target["files"]["inputs"] += now - first
        return now

    def _now(self, first: int) -> int:
        text = self._progress.read_text()
        return int(text) if text else first

    def _watch(self, process: subprocess.Popen[bytes], first: int) -> str | None:
        """Waits for the process to end, or ends it; what was wrong with it."""
        watched, base, last, worked, since = psutil.Process(process.pid), 0, -1, 0.0, time.monotonic()
        problem = None
        while process.poll() is None and problem is None:
            time.sleep(0.5)
            now = self._now(first) if self._progress.read_text() else -1
            with contextlib.suppress(psutil.Error):
                held, times = watched.memory_info().rss, watched.cpu_times()
                base = base or (held if now > first + 200 else 0)
                if base and held > base + GROWTH:
                    problem = f"crash: the process that reads files grew from {base >> 20} to {held >> 20} MiB"
                if now != last:
                    last, worked, since = now, times.user + times.system, time.monotonic()
                long = now >= 0 and times.user + times.system - worked > READING_SECONDS
                if long or time.monotonic() - since > WAITING_SECONDS:
                    problem = f"hang: a file was read for {time.monotonic() - since:.0f} s"
        if problem is not None:
            process.kill()
        process.wait()
        return problem
