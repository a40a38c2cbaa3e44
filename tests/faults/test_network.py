"""The network between a client and the server is pulled, and put back; nobody is told (row 6).

In `make test` a reader behind the proxy; `make faults` pulls real networks too, and trains over them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults.conftest import READER, Place, at_rest
from faults.network import NETWORKS, Network
from support import ONEBASE, environment

pytestmark = pytest.mark.e2e

ALL = os.environ.get("ONEBASE_FAULTS") == "all"
NOTICED = 10.0
"""Seconds: the server pings after 5, and waits 3 for the answer."""


@pytest.fixture(params=NETWORKS if ALL else ["proxy"])
def network(request: pytest.FixtureRequest, place: Place) -> Iterator[Network]:
    made = NETWORKS[request.param]()
    made.open(int(place.server.address.rpartition(":")[2]))
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(make_place: Callable[..., Place]) -> Place:
    """A server that a client in another namespace reaches too; without tokens, which do not go out in plain text."""
    return make_place("--host", "0.0.0.0", "--insecure", "--stream-idle-seconds", "60", guarded=False)


@pytest.mark.fault(6, times=1)
def test_a_reader_whose_network_is_gone_is_noticed_and_learns_it(
    network: Network, place: Place, seen: Callable[..., None]
) -> None:
    script = READER.format(tests=str(Path(__file__).parents[1]), address=network.address, token=place.as_("red").token)
    reader = subprocess.Popen(
        [*network.prefix, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment()
    )
    with ExitStack() as stack:
        stack.callback(reader.communicate)
        stack.callback(reader.kill)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "one\n"
        assert place.status().kv_slots_used == 2
        network.cut()
        place.wait_until(at_rest, NOTICED)
        *_, last = reader.stdout  # by its own pings: nothing came to it
        seen(last.strip())
        assert last == "UNAVAILABLE\n"


WATCHER = """
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onebase.client.channel import OPTIONS
with grpc.insecure_channel({address!r}, options=OPTIONS) as channel:
    try:
        for _ in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            print("one", flush=True)
    except grpc.RpcError as error:
        print(error.code().name, flush=True)
"""


@contextmanager
def watcher(network: Network) -> Iterator[subprocess.Popen[str]]:
    """A plain client on this network, which only listens: the training's own keeps what it is told to itself."""
    command = [*network.prefix, sys.executable, "-c", WATCHER.format(address=network.address)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def trained(name: str, address: str, folder: Path, *prefix: str) -> subprocess.Popen[bytes]:
    """Starts a short training."""
    prompts, config = folder / "prompts.jsonl", folder / "config.yaml"
    prompts.write_text("".join(json.dumps({"prompt": f"w{5 + i} w{40 - i}"}) + "\n" for i in range(24)))
    settings = {
        "policy": {"name": "p", "rank": 4, "alpha": 8},
        "prompts": {"path": str(prompts)},
        "eval": {"samples": 8},
        "rewards": [{"adapter": "r"}],
        "generation": {"max_new_tokens": 8},
        "ppo": {"learning_rate": 0.01, "batch_size": 8, "mini_batch_size": 2, "ppo_epochs": 2},
        "steps": 6,
        "log": {"tensorboard": False},
    }
    config.write_text(json.dumps(settings))
    command = [*prefix, *ONEBASE, "train", str(config), "--server", address, "--policy.name", name]
    return subprocess.Popen(
        [*command, "--output_dir", str(folder / name)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What a training has written so far, but for the times."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("time/") and "seconds" not in key}
        for line in lines
    ]


def end(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    _, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors.decode()


@pytest.mark.fault(6, times=1)
@pytest.mark.skipif(not ALL, reason="takes a minute; `make faults` does it")
def test_a_training_whose_network_is_gone_for_a_while_goes_on_bit_for_bit(
    network: Network, place: Place, tmp_path: Path, seen: Callable[..., None]
) -> None:
    end(trained("undisturbed", place.server.address, tmp_path), seconds=200)
    training = trained("cut", network.address, tmp_path, *network.prefix)
    with ExitStack() as stack:
        stack.callback(training.communicate)
        stack.callback(training.kill)
        beside = stack.enter_context(watcher(network))
        until = time.monotonic() + 100
        while len(numbers(tmp_path / "cut")) < 2:
            assert training.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        network.cut()
        before = numbers(tmp_path / "cut")
        time.sleep(18)  # longer than both sides wait: 8 s the server, 15 the client
        assert len(numbers(tmp_path / "cut")) <= len(before) + 1
        assert training.poll() is None
        assert beside.stdout is not None
        last = beside.stdout.readline().strip()
        seen(last)
        assert last == "UNAVAILABLE"
        network.mend()
        end(training, seconds=200)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "undisturbed")
    assert len(before) < 7
    assert len(numbers(tmp_path / "cut")) == 7
