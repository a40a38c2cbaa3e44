"""Checkpoints in a bucket: kill -9 at every place, the machine lost, the bucket away."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from bucket import BucketServer, register
from oracle.fixtures import FIXTURES
from restarts.conftest import Start, died_of_sigkill
from restarts.plain import STEP, Code, Plain, refused
from restarts.test_client import ROW
from support import start_server

from onebase.client import AdamW, CrossEntropyLoss, LoraSpec, connect

pytestmark = pytest.mark.e2e
PREFIX = "b/run/"
AT = ("--checkpoints", "bucket://b/run")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """The bucket, which outlives every server."""
    with BucketServer() as server:
        register(tmp_path / "driver", server, monkeypatch)
        yield server


@pytest.fixture
def start(store: BucketServer, port: int, state: Path) -> Start:
    """Starts a server with that state on that port, and its checkpoints in the bucket."""
    flags = ("--state", str(state), *AT, *STEP, "--threads", "1")
    return partial(start_server, FIXTURES / "base", *flags, port=port, fresh=True)


def checkpoints(store: BucketServer) -> set[str]:
    return store.folders(PREFIX) - {"owner.json"}


FILES = 5  # of a checkpoint: the adapter and its configuration, the value head, the moments, the manifest


@pytest.mark.parametrize(
    ("place", "left"),
    [
        ("after_rename:kill@3", 0),  # before it, all is as with a disk
        (f"during_put:kill@{3 * FILES}", 1),
        ("after_put:kill@3", 1),
    ],
)
def test_a_kill_before_the_commit_leaves_the_checkpoint_before(
    start: Start, store: BucketServer, state: Path, place: str, left: int
) -> None:
    """Faults 1 and 2 with a bucket: the third checkpoint (created, stepped, stepped) is never committed."""
    with start(failpoints=place) as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train(request_id="one")
        before = client.weights()
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    assert len(checkpoints(store)) == 2 + left
    with start() as server, Plain(server.address) as client:
        assert len(checkpoints(store)) == 2
        assert not list((state / "transit").iterdir())
        assert (client.version(), client.weights()) == (1, before)
        client.session = session
        assert refused(client.step, request_id="two") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
        client.forward(number=1)
        assert client.step(request_id="two").adapter.version == 2


def test_a_kill_after_the_commit_gives_the_retry_the_stored_answer_once(start: Start) -> None:
    with start(failpoints="after_commit:kill@3") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    with start() as server, Plain(server.address) as client:
        client.session = session
        assert client.step(request_id="two").adapter.version == 2
        assert client.step(request_id="two").adapter.version == 2
        assert client.version() == 2


def test_a_lost_machine_loses_no_step(start: Start, store: BucketServer, state: Path) -> None:
    """kill -9, the state directory gone, a fresh one: weights and moments are the same, bit for bit."""
    with start() as server, Plain(server.address) as client:
        client.open()
        client.create("p")
        client.create("q")
        for number in range(3):
            client.train("p", number=number)
        before = {name: client.weights(name) for name in "pq"}
        client.forward("p", number=7)
        after = client.step("p").adapter.version, client.weights("p")
        server.process.kill()
        server.process.wait()
    shutil.rmtree(state)
    with pytest.raises(RuntimeError, match="--adopt"), start():
        pass
    newest = max(key for key in store.objects if _version(store, key) == 4)
    kept = {key: data for key, data in store.objects.items() if key.startswith(newest.rpartition("/")[0])}
    for key in kept:
        del store.objects[key]  # as if the last step had never come there
    with start("--adopt") as server, Plain(server.address) as client:
        assert {name: client.weights(name) for name in "pq"} == before
        assert client.version("p") == 3
        client.open()
        client.forward("p", number=7)
        assert (client.step("p").adapter.version, client.weights("p")) == after


def _version(store: BucketServer, key: str) -> int:
    return json.loads(store.objects[key])["checkpoint"]["version"] if key.endswith("registry.json") else -1


def test_a_bucket_that_is_away_for_a_while_is_a_pause(start: Start, store: BucketServer) -> None:
    """The client's retries make the step durable, once; what needs no bucket goes on."""

    with start() as server, connect(server.address) as client, client.open_session() as session:
        session.create_adapter("p", LoraSpec(rank=4, target_modules=("all-linear",)))
        session.set_active("p")
        session.forward_backward(ROW, CrossEntropyLoss())
        store.status, store.only = 503, ("PUT",)
        back = threading.Timer(3.0, lambda: setattr(store, "status", 200))
        back.start()
        began = time.monotonic()
        assert session.optim_step(AdamW(learning_rate=0.01)).adapter.version == 1
        assert time.monotonic() - began > 3.0
        assert client.adapter("p").durable_version == 1
        assert client.adapter("p").version == 1
