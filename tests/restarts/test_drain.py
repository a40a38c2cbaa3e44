"""SIGTERM: work in flight finishes, nothing else begins, state is saved."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from restarts.conftest import Start
from restarts.plain import Code, Plain, kill, refused, wait_until_durable
from server.harness import eventually

from onebase.v1 import server_pb2

pytestmark = pytest.mark.e2e


def there(client: Plain, work: str) -> int:
    """Requests of a kind that wait or run."""
    queues = client.server.GetStatus(server_pb2.GetStatusRequest()).queues
    return sum(one.waiting + one.running for one in queues if one.work == work)


@pytest.mark.fault(35, times=2)
def test_sigterm_lets_work_in_flight_end_and_no_other_begin(start: Start) -> None:
    """Fault 35: completions and a pass of training that were begun end; what comes later is refused."""
    with start("--checkpoint-seconds", "0", "--drain-seconds", "120") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        stream = client.generate(n=64)
        next(stream)
        passing = client.training.ForwardBackward.future(client.passed(count=1000))
        eventually(lambda: there(client, "train") == 1)  # what is long to read may come behind what was sent later
        stepping = client.training.OptimStep.future(client.stepped(request_id="last"))
        eventually(lambda: there(client, "train") == 2)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 30
        health = health_pb2_grpc.HealthStub(client.channel)
        while health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < until
            time.sleep(0.01)
        for call in (client.version, client.forward, client.open):
            assert refused(call) == (Code.UNAVAILABLE, "DRAINING")
        assert server.process.poll() is None
        assert not passing.done()
        assert not stepping.done()
        ends = [part for part in stream if part.finish_reason]
        assert len(ends) == 64
        assert passing.result(60).pending_gradients == 1
        answer = stepping.result(60)
        assert (answer.adapter.version, answer.gradients_applied) == (2, 1)
        assert server.process.wait(60) == 0
    with start() as server, Plain(server.address) as client:
        client.session = session
        assert client.version() == 2
        assert client.step(request_id="last") == answer  # saved, with the answer, and not made again
        made = client.weights()
        client.create("undisturbed")
        client.train("undisturbed")
        client.training.ForwardBackward(client.passed("undisturbed", count=1000))
        client.step("undisturbed")
        assert made == client.weights("undisturbed")


@pytest.mark.fault(35, times=2)
def test_sigterm_saves_what_no_checkpoint_has_and_a_kill_reuses_no_version(start: Start, state: Path) -> None:
    """Fault 35; and what is promised without `--durability step`."""
    with start("--checkpoint-seconds", "0") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train(request_id="one")
        client.train(number=1)
        saved = client.weights()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert refused(client.version)[0] is Code.UNAVAILABLE
    with start("--checkpoint-seconds", "0", "--checkpoint-steps", "2") as server, Plain(server.address) as client:
        client.session = session
        assert (client.version(), client.weights()) == (2, saved)
        assert client.step(request_id="one").adapter.version == 1
        for number in range(2):
            client.train(number=number)
        kept = client.weights()
        wait_until_durable(state, 4)
        client.train(number=5, request_id="lost")
        kill(server)
    with start() as server, Plain(server.address) as client:
        client.session = session
        assert client.weights() == kept
        assert client.version() > 5
        assert refused(client.step, request_id="lost") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
