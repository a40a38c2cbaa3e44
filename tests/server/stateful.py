"""A server with a state directory and a fake worker, in one process, started again and again on the same state."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import contextmanager

import pytest
from server.fakes import FACTS, FakeWorker
from server.harness import Clock, Live

from onebase.server.checkpoints import StateDirectory
from onebase.server.config import EngineConfig, ServerConfig, StateConfig
from onebase.server.opening import open_durable
from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2, types_pb2


class StateWorker(FakeWorker):
    """Keeps the version in what it writes, and reads it from there."""

    def _save(self, uid, path):
        facts = self.adapters[uid]
        self.written["onebase.json"] = json.dumps({"version": facts.version, "sha256": {}}).encode()
        return super()._save(uid, path)

    def _LoadAdapterJob(self, job):
        facts = super()._LoadAdapterJob(job)
        if "onebase.json" in self.read and "checkpoints" in job.path.parts:
            version = json.loads(self.read["onebase.json"])["version"]
            facts = self._change(job.uid, version=max(version, job.least_version))
        return facts


@pytest.fixture
def serve(tmp_path):
    """Starts a server on the same state, with a worker of its own."""

    @contextmanager
    def start(facts=FACTS, rewards=(), policies=(), folder=tmp_path, **state):
        state_config = StateConfig(folder / "state", **{"seconds": 0.0, **state})
        worker, clock = StateWorker(facts), Clock()
        keeper = open_durable(worker, StateDirectory(state_config.path), state_config)
        keeper._clock = clock
        config = ServerConfig(
            EngineConfig(model="fake"),
            port=0,
            drain_seconds=5,
            state=state_config,
            rewards=rewards,
            policies=policies,
            roots=(tmp_path,),
        )
        with Live(config, worker, clock, keeper) as live:
            live.keeper = keeper
            live.session = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=60)).session_id
            yield live

    return start


def create(live, name="p"):
    return live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=live.session, name=name))


def step(live, name="p", request_id=""):
    adamw = training_pb2.AdamW(learning_rate=0.1)
    return live.training.OptimStep(
        training_pb2.OptimStepRequest(session_id=live.session, request_id=request_id, adapter=name, adamw=adamw)
    )


def version(live, name="p"):
    return live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name)).version


def committed(live, name="p"):
    """The version of each of the adapter's checkpoints, the newest first."""
    uid = live.uid(name)
    return [row.version for row in live.keeper._errands._store.submit(live.keeper.store.checkpoints, uid).result()]


@contextmanager
def slow_disk(live):
    """Nothing is committed inside the block."""
    passes = threading.Event()
    live.keeper._errands._store.submit(passes.wait, 20)
    try:
        yield
    finally:
        passes.set()


def tokens():
    """Two tokens."""
    return types_pb2.Content(tokens=types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=[1], data=bytes(8)))


def killed_after(live, change, folder, monkeypatch):
    """Where copies of the state will be, as kills just after each such change of the store would leave it."""
    copies, commit = [], getattr(live.keeper.store, change)

    def killed_then(*arguments):
        dropped = commit(*arguments)
        copies.append(killed(folder))
        return dropped

    monkeypatch.setattr(live.keeper.store, change, killed_then)
    return copies


def killed(folder):
    """Where a copy of the state is, as a kill would leave it now: for `serve(folder=…)`."""
    copy = folder / "after-the-kill"
    shutil.copytree(folder / "state", copy / "state")
    return copy
