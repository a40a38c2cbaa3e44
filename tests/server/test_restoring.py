"""What a start takes up, and what it goes back to: with a fake worker, in one process."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from server.test_durability import serve as serve  # a fixture
from server.test_durability import version

from onebase.server.config import AdapterSource
from onebase.v1 import adapters_pb2, sessions_pb2, types_pb2


@pytest.fixture
def start(serve):
    """Starts a server whose session has ended when it stops, and with it its leases."""

    @contextmanager
    def starts(**settings):
        with serve(**settings) as live:
            yield live
            live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=live.session))

    return starts


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "r").mkdir()
    return AdapterSource("judge", tmp_path / "r")


def load(live, *, replace):
    request = adapters_pb2.LoadAdapterRequest(
        session_id=live.session, name="judge", path="r", kind=types_pb2.ADAPTER_KIND_REWARD, replace=replace
    )
    return live.adapters.LoadAdapter(request).version


def test_a_reward_of_the_settings_goes_on_after_those_that_clients_loaded_under_its_name(start, judge):
    with start() as live:
        assert [load(live, replace=again) for again in (False, True, True)] == [0, 1, 2]
    with start(rewards=(judge,)) as live:
        assert version(live, "judge") == 3
    with start(rewards=(judge,)) as live:
        assert version(live, "judge") == 3  # it is read from the same path
        assert load(live, replace=True) == 4
    with start(rewards=(judge,)) as live:
        assert version(live, "judge") == 5
        request = adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="judge")
        live.adapters.DeleteAdapter(request)
    with start() as live:
        assert load(live, replace=False) == 6
