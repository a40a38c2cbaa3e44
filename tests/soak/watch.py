"""What a server holds, sampled from outside: memory, descriptors, threads, disk, rows."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from onebase.v1 import server_pb2

TABLES = ("adapters", "checkpoints", "responses", "sessions", "ends")
SHARED = ("responses", "ends")
"""Tables of which each tenant has a share with a bound of its own."""


@dataclass
class Samples:
    """Series by name, taken at the same times."""

    seconds: list[float] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, values: dict[str, float]) -> None:
        """One sample of each."""
        self.seconds.append(seconds)
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)

    def after(self, seconds: float) -> Samples:
        """Those taken later."""
        first = next((i for i, at in enumerate(self.seconds) if at >= seconds), len(self.seconds))
        return Samples(self.seconds[first:], {name: values[first:] for name, values in self.series.items()})


@dataclass
class Watch:
    """Samples one server.

    Args:
        pid: its process.
        state: its state directory.
        status: asks it for its status.
    """

    pid: int
    state: Path
    status: Callable[[], server_pb2.ServerStatus]
    samples: Samples = field(default_factory=Samples)
    _began: float = field(default_factory=time.monotonic)

    def sample(self) -> dict[str, float]:
        """Takes one of each, and keeps them."""
        process, status = psutil.Process(self.pid), self.status()
        memory = process.memory_full_info()
        values = {
            "rss_bytes": memory.rss,
            "pss_bytes": memory.pss,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
            "state_bytes": _bytes(self.state),
            "kv_slots_used": status.kv_slots_used,
            "live_sessions": len(status.sessions),
            **self._rows(),
        }
        self.samples.add(time.monotonic() - self._began, values)
        return values

    def _rows(self) -> dict[str, int]:
        """Of each table, and of the tenant that has most of them where each has a share."""
        most = "SELECT COALESCE(MAX(count), 0) FROM (SELECT COUNT(*) AS count FROM {} GROUP BY owner)"
        store = f"file:{self.state / 'registry.sqlite'}?mode=ro"
        with closing(sqlite3.connect(store, uri=True)) as db:
            asked = {f"rows_{table}": f"SELECT COUNT(*) FROM {table}" for table in TABLES}
            asked |= {f"most_{table}": most.format(table) for table in SHARED}
            return {name: db.execute(question).fetchone()[0] for name, question in asked.items()}


def _bytes(folder: Path) -> int:
    """Of the files that are there now; some go while one looks."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(here, name)).st_size
    return total
