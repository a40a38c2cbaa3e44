import re
from types import SimpleNamespace

import pytest
from client.fakes import FakeServer
from typer.testing import CliRunner

from onebase.client import cli
from onebase.client.client import Client
from onebase.client.retry import Backoff
from onebase.client.transport import Transport

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def server():
    server = FakeServer().start()
    yield server
    server.stop()


@pytest.fixture
def transport(server):
    """A transport that does not let a test wait long between retries."""
    transport = Transport(server.target, timeout=60.0, backoff=Backoff(first=0.001, longest=0.002))
    yield transport
    transport.close()


@pytest.fixture
def client(transport):
    with Client(transport) as client:
        yield client


@pytest.fixture
def run(server, monkeypatch):
    """Runs the command line in this process."""
    monkeypatch.setenv("ONEBASE_SERVER", server.target)
    monkeypatch.setenv("COLUMNS", "100")
    runner = CliRunner()

    def run(*args, stdin=None):
        result = runner.invoke(cli.app, list(args), input=stdin)
        return SimpleNamespace(
            code=result.exit_code, out=ANSI.sub("", result.stdout), err=ANSI.sub("", result.stderr), raw=result
        )

    return run
