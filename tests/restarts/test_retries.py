"""kill -9 between the commit of a change and its answer: the retry finds the answer, and the change is there once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults.uploads import POLICY, upload
from oracle.fixtures import FIXTURES
from restarts.conftest import Start, checkpoints, died_of_sigkill
from restarts.plain import STEP, Code, Plain, kill, refused

from onebase.client import connect
from onebase.v1 import adapters_pb2, server_pb2, sessions_pb2, types_pb2

pytestmark = pytest.mark.e2e
ROOT = ("--root", str(FIXTURES))
FILES = ("adapter_config.json", "adapter_model.safetensors")


Change = Callable[[Plain, str], Any]
"""Makes an adapter of this name in a call whose request_id is `it`."""


def create(client: Plain, name: str) -> types_pb2.Adapter:
    return client.create(name, request_id="it")


def load(client: Plain, name: str) -> types_pb2.Adapter:
    return client.adapters.LoadAdapter(
        adapters_pb2.LoadAdapterRequest(
            session_id=client.session, request_id="it", name=name, kind=POLICY, path="policy", replace=True
        )
    )


def send(client: Plain, name: str) -> types_pb2.Adapter:
    files = {file: (FIXTURES / "policy" / file).read_bytes() for file in FILES}
    return client.adapters.UploadAdapter(upload(name, files, session_id=client.session, request_id="it"))


@pytest.mark.fault(3, times=2)
@pytest.mark.parametrize("change", [create, load, send])
def test_a_kill_after_an_adapter_is_made_makes_it_once(start: Start, state: Path, change: Change) -> None:
    with start(*ROOT, failpoints="after_commit:kill@1") as server, Plain(server.address) as client:
        session = client.open()
        assert refused(change, client, "p") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    with start(*ROOT) as server, Plain(server.address) as client:
        client.session = session
        listed = client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
        assert [(one.name, one.version) for one in listed if one.name != "reward"] == [
            ("p", 0)
        ]  # before it is asked for
        there = checkpoints(state)
        answer = change(client, "p")
        assert (answer.name, answer.version) == ("p", 0)
        assert change(client, "p") == answer
        assert client.version() == 0
        assert checkpoints(state) == there  # and nothing was made in its place
        made = client.weights("p")
        client.session = client.open()
        change(client, "undisturbed")
        assert made == client.weights("undisturbed")


@pytest.mark.fault(3, times=2)
def test_a_kill_after_an_adapter_is_deleted_deletes_it_once(start: Start) -> None:
    def delete() -> adapters_pb2.DeleteAdapterResponse:
        request = adapters_pb2.DeleteAdapterRequest(session_id=session, request_id="it", name="p")
        return client.adapters.DeleteAdapter(request)

    with start(failpoints="after_commit:kill@2") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        assert refused(delete) == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    with start() as server, Plain(server.address) as client:
        client.session = session
        assert refused(client.version) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        delete()
        client.create()
        before = client.weights()
        delete()  # is answered, and means the one that is gone
        assert client.weights() == before


@pytest.mark.fault(3, 34, times=2)
def test_a_kill_after_the_commit_gives_the_retry_the_stored_answer_once(start: Start) -> None:
    """Fault 3, for every change whose answer outlives the process; 34 after a restart."""
    with start(*STEP, failpoints="after_commit:kill@3") as server, Plain(server.address) as client:
        session = client.open()
        made = client.create(request_id="make")
        client.train(request_id="one")
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        answer = client.step(request_id="two")
        assert (answer.adapter.version, answer.gradients_applied) == (2, 1)
        assert client.step(request_id="two") == answer
        assert client.step(request_id="one").adapter.version == 1
        assert client.version() == 2
        client.create("undisturbed")
        for number in range(2):
            client.train("undisturbed", number=number)
        assert client.weights() == client.weights("undisturbed")
        assert client.create(request_id="make") == made
        assert refused(client.step, request_id="two", rate=0.5) == (Code.ABORTED, "REQUEST_ID_REUSED")
        assert refused(client.create, request_id="again") == (Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
        delete = adapters_pb2.DeleteAdapterRequest(session_id=session, request_id="gone", name="p")
        client.adapters.DeleteAdapter(delete)
        kill(server)
    with start(*STEP) as server, Plain(server.address) as client:
        client.adapters.DeleteAdapter(delete)
        assert refused(client.version) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        client.session = session
        assert client.create().version == 3  # it goes on after what was deleted


@pytest.mark.fault(3, times=2)
def test_a_kill_while_a_session_is_opened_leaves_one_session(start: Start) -> None:
    """Which the retry is given, by a plain client and by onebase's own, whose user notices nothing."""
    opening = sessions_pb2.OpenSessionRequest(ppo_adapter_name="p", label="it", ttl_seconds=600, request_id="it")
    with start(*STEP) as server, Plain(server.address) as client:
        client.open()
        client.create()
        client.close()
    with start(*STEP, failpoints="noted:kill@1") as server, Plain(server.address) as client:
        assert refused(client.sessions.OpenSession, opening) == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    with start(*STEP, failpoints="noted:kill@2") as server, Plain(server.address) as client:
        sessions = client.server.GetStatus(server_pb2.GetStatusRequest()).sessions
        assert [(one.label, list(one.leases)) for one in sessions] == [("it", ["p"])]
        opened = client.sessions.OpenSession(opening)
        assert client.sessions.OpenSession(opening) == opened
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=opened.session_id))
        with connect(server.address) as patient, ThreadPoolExecutor() as pool:
            late = pool.submit(patient.open_session, "p", label="it")
            assert died_of_sigkill(server)
            with start(*STEP):
                assert late.result(60).refresh().leases == ("p",)
                assert [(one.label, one.leases) for one in patient.status().sessions] == [("it", ("p",))]
