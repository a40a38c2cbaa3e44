import pytest
from client.fakes import FakeServer

from onebase.client.client import Client
from onebase.client.retry import Backoff
from onebase.client.transport import Transport


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
