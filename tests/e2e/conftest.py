"""A real server with many policies, in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import RunningServer, start_server

from onebase.client import Client, connect

FIXTURES = Path(__file__).parents[1] / "oracle" / "fixtures"
READERS = tuple(f"reader_{i}" for i in range(12))
TRAINEES = tuple(f"trainee_{i}" for i in range(4))
REWARDS = ("reward", "reward_2")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server may load and save."""
    path = tmp_path_factory.mktemp("e2e") / "root"
    shutil.copytree(FIXTURES, path)
    return path


@pytest.fixture(scope="session")
def server(root: Path) -> Iterator[RunningServer]:
    """A server with two rewards, and policies of two shapes."""
    flags = [flag for name in REWARDS for flag in ("--reward", f"{name}={root / name}")]
    for i, name in enumerate((*READERS, *TRAINEES)):
        flags += ["--policy", f"{name}={root / ('policy', 'policy_all')[i % 2]}"]
    with start_server(root / "base", *flags, "--root", str(root), "--threads", "1", "--step-tokens", "256") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[Client]:
    """A client of it."""
    with connect(server.address) as client:
        yield client
