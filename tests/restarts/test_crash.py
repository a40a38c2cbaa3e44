"""A crash inside the server: what is in flight is answered, a fresh server takes its place, and trainers see a pause."""

from __future__ import annotations

import os
import time
from pathlib import Path

import grpc
import pytest
from restarts.conftest import Start
from restarts.test_restart import Plain, refused
from restarts.test_training import config as config  # a fixture

pytestmark = pytest.mark.e2e
STEP = ("--durability", "step")
Code = grpc.StatusCode


def wait_for(client: Plain, seconds: float = 90.0) -> None:
    """Until calls are served again."""
    until = time.monotonic() + seconds
    while True:
        try:
            client.score()
            return
        except grpc.RpcError as error:
            assert error.code() is Code.UNAVAILABLE, error
            assert time.monotonic() < until
            time.sleep(0.1)


def open_files(pid: int) -> list[str]:
    """What a process has open."""
    return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]


@pytest.mark.parametrize("how", ["crash", "bug", "poison"])
def test_a_crash_of_the_engine_is_a_clean_restart(start: Start, state: Path, how: str) -> None:
    place = {"crash": "worker", "bug": "worker", "poison": "infer"}[how]
    with start(*STEP, failpoints=f"{place}:{how}@60") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train(request_id="one")
        before, files = client.weights(), len(open_files(server.process.pid))
        client.forward(number=1)
        told = None
        while told is None:
            try:
                client.score()
            except grpc.RpcError:
                told = refused(client.score)
        assert told[0] is Code.UNAVAILABLE
        wait_for(client)
        assert server.process.poll() is None  # the same process, on the same port
        log = server.text()
        assert "the engine is lost, ticket" in log
        assert "(1 of 3 restarts" in log
        assert len(open_files(server.process.pid)) <= files
        assert (state / "lock").read_text().strip() == str(server.process.pid)
        client.session = session
        assert (client.version(), client.weights()) == (1, before)
        assert client.step(request_id="one").adapter.version == 1
        assert refused(client.step, request_id="two") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
        assert client.train(number=1, request_id="two").adapter.version == 2
