"""A crash inside the server: what is in flight is answered, a fresh one takes its place, and trainers see a pause."""

from __future__ import annotations

import os
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oracle.fixtures import FIXTURES
from restarts.conftest import Start
from restarts.plain import Plain, reason_of, refused
from restarts.test_training import WEIGHTS, finish, numbers, trained, weights
from restarts.test_training import config as config  # a fixture
from support import start_server

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
            if error.code() is not Code.UNAVAILABLE or time.monotonic() > until:
                raise
            time.sleep(0.1)


def told_of_the_crash(client: Plain) -> tuple[Code, str]:
    """What the call is told that is under way when the engine crashes."""
    for _ in range(100):
        try:
            client.score()
        except grpc.RpcError as error:
            return reason_of(error)
    raise AssertionError("it never crashed")


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
        assert told_of_the_crash(client) == (Code.UNAVAILABLE, "WORKER_CRASHED")
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


def test_a_restore_is_not_done_again_by_a_server_that_starts_again_with_its_command_line(start: Start) -> None:
    """By itself after a crash, then by whoever watches it: what was answered since the restore stays."""
    with start(*STEP, "--keep-checkpoints", "4") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        for number in range(3):
            client.train(number=number)
        server.process.kill()
        server.process.wait()
    flags = (*STEP, "--keep-checkpoints", "2", "--restore", "p=2")
    with start(*flags, failpoints="worker:bug@100") as server, Plain(server.address) as client:
        client.session = session
        assert client.version() == 4  # the numbers of 2, as 3 was given
        for number in range(3):  # so many that the checkpoint of 2 has had its time
            assert client.train(number=7 + number).adapter.version == 5 + number
        before = client.weights()
        assert told_of_the_crash(client) == (Code.UNAVAILABLE, "WORKER_CRASHED")
        wait_for(client)
        assert server.process.poll() is None
        assert (client.version(), client.weights()) == (7, before)
        assert "restore p=2 was done at" in server.text()
        server.process.kill()
        server.process.wait()
    with start(*flags) as server, Plain(server.address) as client:
        assert (client.version(), client.weights()) == (7, before)


def test_two_runs_whose_engine_crashes_end_bit_for_bit_as_undisturbed_ones(
    config: Path, tmp_path: Path, start: Start, state: Path
) -> None:
    with start(*STEP) as server:
        finish(trained(config, server.address, tmp_path / "undisturbed"))
        wanted = weights(server.address, tmp_path / "undisturbed")
    state.rename(tmp_path / "state of the undisturbed")
    with start(*STEP, failpoints="worker:crash@60,train:poison@25") as server:
        finish(trained(config, server.address, tmp_path / "run"))
        found = weights(server.address, tmp_path / "run")
        log = server.text()
    assert "(2 of 3 restarts" in log
    assert found == wanted
    for name in WEIGHTS:
        assert numbers(tmp_path / "run" / name) == numbers(tmp_path / "undisturbed" / name)


def test_a_step_that_never_ends_turns_health_and_is_then_a_crash_and_a_free_port_stays(state: Path) -> None:
    """The port is chosen once: clients know it."""
    flags = ("--state", str(state), "--threads", "1", "--stall-seconds", "1", "--stall-restart-seconds", "4")
    with (
        start_server(FIXTURES / "base", *flags, failpoints="infer:hang@3") as server,
        Plain(server.address) as client,
    ):
        stub = health_pb2_grpc.HealthStub(client.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="onebase.v1.InferenceService"))
        health = health_pb2.HealthCheckResponse
        assert next(watch).status == health.SERVING
        assert told_of_the_crash(client) == (Code.UNAVAILABLE, "WORKER_CRASHED")
        assert next(watch).status == health.NOT_SERVING
        wait_for(client)
        assert server.process.poll() is None
        assert "a step went on for" in server.text()


def test_without_a_state_a_crash_ends_the_server_with_a_code_of_its_own() -> None:
    with (
        start_server(FIXTURES / "base", "--threads", "1", failpoints="infer:poison@3") as server,
        Plain(server.address) as client,
    ):
        assert told_of_the_crash(client) == (Code.UNAVAILABLE, "WORKER_CRASHED")
        assert server.process.wait(30) == 70
        assert "start it again, with --state DIR" in server.text()


def test_a_crash_that_comes_back_is_not_repeated_for_ever(start: Start, state: Path) -> None:
    every = ",".join(f"worker:bug@{number}" for number in range(1, 9))  # while it loads the reward
    with pytest.raises(RuntimeError, match="did so 3 times before within 10 minutes") as caught:
        start(failpoints=every, wait=280.0).__enter__()
    assert str(caught.value).count("the engine is lost, ticket") == 4


def test_a_thread_of_the_store_that_ends_is_an_error_of_the_call_alone(start: Start) -> None:
    with start(*STEP, failpoints="store:crash@14") as server, Plain(server.address) as client:
        client.open()
        client.create()
        seen = set()
        for number in range(8):
            client.forward(number=number)
            try:
                client.step(request_id=f"step {number}")
            except grpc.RpcError as error:
                seen.add(reason_of(error))
                answer = client.step(request_id=f"step {number}")  # which is made, and only has to be saved
                assert answer.adapter.version == number + 1
        assert seen == {(Code.INTERNAL, "INTERNAL")}
        assert client.version() == 8
        assert server.process.poll() is None
