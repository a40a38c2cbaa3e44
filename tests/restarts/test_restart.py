"""kill -9 and start again: real processes, a plain gRPC client, nothing lost.

Each test says which rows of the table of faults it shows.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from restarts.conftest import Start, checkpoints, died_of_sigkill
from restarts.plain import STEP, Code, Plain, kill, refused, wait_until_durable

from onebase.v1 import sessions_pb2, training_pb2

pytestmark = pytest.mark.e2e


@pytest.mark.fault(1, times=3)
def test_a_kill_before_the_rename_leaves_the_checkpoint_before_and_sweeps_the_leftover(
    start: Start, state: Path
) -> None:
    killed_before_the_commit(start, state, "before_rename:kill@4")  # the download is written too


@pytest.mark.fault(2, times=3)
def test_a_kill_before_the_commit_leaves_the_checkpoint_before_and_sweeps_the_leftover(
    start: Start, state: Path
) -> None:
    killed_before_the_commit(start, state, "after_rename:kill@3")


def killed_before_the_commit(start: Start, state: Path, place: str) -> None:
    """The third checkpoint (created, stepped, stepped) is never committed."""
    with start(*STEP, failpoints=place) as server, Plain(server.address) as client:
        client.open()
        client.create()
        client.train(request_id="one")
        before = client.weights()
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
        session = client.session
    assert len(checkpoints(state)) == 3
    with start(*STEP) as server, Plain(server.address) as client:
        assert len(checkpoints(state)) == 2
        assert client.version() == 1
        assert client.weights() == before
        client.session = session
        assert refused(client.step, request_id="two") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
        client.forward(number=1)
        assert client.step(request_id="two").adapter.version == 2


@pytest.mark.fault(4, times=2)
def test_completions_that_were_cut_off_are_drawn_again_and_are_the_same(start: Start) -> None:
    """Fault 4, for a client that does it by itself."""
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        wanted = [(part.completion_index, part.tokens.data) for part in client.generate()]
        stream = client.generate()
        cut = next(stream)
        os.kill(server.process.pid, signal.SIGKILL)
        assert refused(list, stream) == (Code.UNAVAILABLE, "")
        server.process.wait()
    assert (cut.completion_index, cut.tokens.data) in wanted
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        assert sorted((part.completion_index, part.tokens.data) for part in client.generate()) == sorted(wanted)


@pytest.mark.fault(32, 33, times=2)
def test_sessions_come_back_with_their_leases_and_active_adapter(start: Start) -> None:
    """Faults 32 and 33 after a restart, and the session's own facts."""
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create("p")
        client.create("q")
        request = sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name="q")
        before = client.sessions.SetActiveAdapter(request)
        ended = client.open()
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=ended))
        client.session = session
        client.forward("p")
        kill(server)
    with start(*STEP) as server, Plain(server.address) as client:
        assert client.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)) == before
        gone = sessions_pb2.GetSessionRequest(session_id=ended)
        assert refused(client.sessions.GetSession, gone) == (Code.NOT_FOUND, "SESSION_NOT_FOUND")
        client.open()
        assert refused(client.forward, "p") == (Code.ABORTED, "NOT_LEASE_HOLDER")
        taking = sessions_pb2.OpenSessionRequest(ppo_adapter_name="p", ttl_seconds=60)
        assert refused(client.sessions.OpenSession, taking) == (Code.ABORTED, "ADAPTER_LEASED")
        client.session = session
        assert refused(client.step, "p") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
        client.train("p")
        stale = training_pb2.OptimStepRequest(
            session_id=session, adapter="p", expected_version=0, adamw=training_pb2.AdamW(learning_rate=0.1)
        )
        client.forward("p")
        assert refused(client.training.OptimStep, stale) == (Code.ABORTED, "VERSION_MISMATCH")
        assert client.version("p") == 1


def test_a_lease_that_ends_saves_the_adapter(start: Start, state: Path) -> None:
    with start("--checkpoint-seconds", "0") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        trained = client.weights()
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
        wait_until_durable(state, 1)
        kill(server)
    with start() as server, Plain(server.address) as client:
        assert client.weights() == trained


def test_a_second_server_and_another_base_are_refused(start: Start, port: int, state: Path) -> None:
    with start() as server, Plain(server.address) as client:
        client.open()
        client.create()
        with pytest.raises(RuntimeError, match="another server"):
            start(port=0).__enter__()
    from oracle.fixtures import FIXTURES
    from support import start_server

    with (
        pytest.raises(RuntimeError, match="belongs to the base"),
        start_server(FIXTURES / "base_gpt2", "--state", str(state)),
    ):
        raise AssertionError
