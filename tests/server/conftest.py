from __future__ import annotations

import pytest
from server.harness import Live
from server.stateful import serve  # noqa: F401  (a fixture)

from onebase.server.jobs import AdapterKind, LoadAdapterJob
from onebase.server.registry import Registry
from onebase.v1 import adapters_pb2, sessions_pb2


@pytest.fixture
def live():
    """A server with a policy p1 with a value head, rewards r1 and r2, and a reference ref; nobody holds p1."""
    with Live() as server:
        furnish(server)
        yield server


def furnish(server):
    server.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="p1", value_head=True))
    for name, kind in (("r1", AdapterKind.REWARD), ("r2", AdapterKind.REWARD), ("ref", AdapterKind.REFERENCE)):
        server.on_loop(bind, server, name, kind)


def bind(server, name, kind, **facts):
    """What a load would have done, without a directory; `facts` are what it would have found."""
    registry: Registry = server.edge.registry
    reservation = registry.reserve(name)
    job = LoadAdapterJob(uid=reservation.uid, name=name, kind=kind, path=None)
    server.worker._LoadAdapterJob(job)
    registry.bind(reservation, server.worker._change(reservation.uid, **facts), "/somewhere")


@pytest.fixture
def session(live):
    """A session whose active adapter is p1, with its lease."""
    return live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="p1", label="one")).session_id
