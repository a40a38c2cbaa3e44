"""Real servers over real gRPC, one for each base of the fixtures, shared by the tests of this directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from oracle.fixtures import FIXTURES, POLICIES, REWARDS
from support import start_server

from onebase.client import Client, connect

Connect = Callable[[str], Client]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What servers may read and write: a copy of the fixtures, and whatever a test puts beside them."""
    path = tmp_path_factory.mktemp("oracle") / "root"
    shutil.copytree(FIXTURES, path)
    return path


@pytest.fixture
def place(root: Path) -> Path:
    """A directory of the test's own that servers may read and write."""
    return Path(tempfile.mkdtemp(dir=root))


@pytest.fixture(scope="session")
def client_of(root: Path) -> Iterator[Connect]:
    """A client of the server of a base, with that base's adapters under their own names."""
    with ExitStack() as stack:
        clients: dict[str, Client] = {}

        def client_of(base: str) -> Client:
            if base not in clients:
                flags = ["--root", str(root), "--threads", "1"]
                for kind, names in (("--reward", REWARDS), ("--policy", POLICIES)):
                    flags += [flag for name in names[base] for flag in (kind, f"{name}={root / name}")]
                server = stack.enter_context(start_server(root / base, *flags))
                clients[base] = stack.enter_context(connect(server.address))
            return clients[base]

        yield client_of


@pytest.fixture(scope="session")
def client(client_of: Connect) -> Client:
    """A client of the Llama's server."""
    return client_of("base")
