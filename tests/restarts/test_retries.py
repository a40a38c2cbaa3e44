"""kill -9 between the commit of a change and its answer: the retry finds the answer, and the change is there once."""

from __future__ import annotations

import pytest
from restarts.conftest import Start, died_of_sigkill
from restarts.plain import STEP, Code, Plain, kill, refused

from onebase.v1 import adapters_pb2

pytestmark = pytest.mark.e2e


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
