"""How a server ends that is told to stop: in time whatever hangs, with nothing changed behind the last checkpoints."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grpc
import pytest
from server.fakes import FACTS, FakeText, FakeWorker
from server.harness import Clock, Live, pair, refusal_of
from server.stateful import StateWorker, create, step

from onebase.server import ending
from onebase.server.app import Parts, Report, serve
from onebase.server.checkpoints import StateDirectory
from onebase.server.config import AdapterSource, EngineConfig, ServerConfig, StateConfig
from onebase.server.ending import CUT_OFF
from onebase.server.jobs import CreateAdapterJob, OptimStepJob, ScoreJob
from onebase.server.opening import open_durable
from onebase.server.successor import EXIT_CODE
from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2


class Ended(Exception):
    """What a process that ends raises in here."""


def config(**more):
    return ServerConfig(**{"engine": EngineConfig(model="fake"), "port": 0, "drain_seconds": 0.2, **more})


def blow_after(seconds, *, times=1):
    def blow():
        for _ in range(times):
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=blow, daemon=True).start()


def end_of(worker, settings, ready=lambda port: None):
    """What becomes of a server in this thread, which gets real signals."""
    seen = []

    def note(what):
        seen.append(what)
        raise Ended

    report = Report(
        ready=lambda port: (seen.append("ready"), ready(port)),
        lost=lambda ticket, port: note("replaced"),
        cut_off=note,
    )
    try:
        asyncio.run(serve(Parts(worker, FakeText()), settings, report))
        seen.append("ended")
    except Ended:
        pass
    return seen


class State(Live):
    """A server whose adapters outlive it."""

    def __init__(self, folder, drain):
        state = StateConfig(folder / "state", seconds=0.0)
        worker = StateWorker(FACTS)
        self.keeper = open_durable(worker, StateDirectory(state.path), state)
        super().__init__(config(drain_seconds=drain, state=state), worker, Clock(), self.keeper)

    def version(self):
        return self.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p")).version


@pytest.mark.fault(35)
def test_no_step_is_answered_behind_the_last_checkpoint_of_its_adapter(tmp_path):
    with State(tmp_path, drain=0.3) as live:
        live.session = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=60)).session_id
        session = live.session
        create(live, "p")
        step(live, "p")
        live.worker.hold(OptimStepJob)
        adamw = training_pb2.AdamW(learning_rate=0.1)
        request = training_pb2.OptimStepRequest(session_id=session, adapter="p", adamw=adamw, request_id="x")
        late = live.training.OptimStep.future(request)
        live.worker.wait_submitted(OptimStepJob, 2)
        last = live.keeper._last_checkpoint

        async def checkpoint(uid, track):
            await last(uid, track)
            live.worker.release()  # the step is made now, if it is made at all
            await asyncio.sleep(0.3)

        live.keeper._last_checkpoint = checkpoint
        live.begin_stop()
        with pytest.raises(grpc.RpcError) as told:
            late.result(20)
        assert refusal_of(told.value).reason == "DRAINED"
    with State(tmp_path, drain=0.3) as live:
        assert live.version() == 1
        live.session = session
        assert live.training.OptimStep(request).adapter.version == 2


def test_an_engine_that_crashes_while_the_server_drains_ends_it_with_the_code_of_a_crash():
    worker = FakeWorker()

    def ready(_port):
        os.kill(os.getpid(), signal.SIGTERM)
        worker.ticket = "boom"

    assert end_of(worker, config(), ready) == ["ready", EXIT_CODE]


def test_who_is_told_to_stop_after_a_crash_is_not_replaced():
    worker = FakeWorker()

    def ready(_port):
        worker.ticket = "boom"
        blow_after(1.5)  # while the last answers go out

    assert end_of(worker, config(), ready) == ["ready", EXIT_CODE]


def test_a_crash_without_a_word_to_stop_is_replaced():
    worker = FakeWorker()
    assert end_of(worker, config(), lambda _: setattr(worker, "ticket", "boom")) == ["ready", "replaced"]


def test_who_is_told_to_stop_while_it_loads_ends_without_serving(tmp_path):
    worker = FakeWorker()
    worker.hold(CreateAdapterJob)
    names = tuple(AdapterSource(name, None) for name in "pqr")
    blow_after(0.4)
    began = time.monotonic()
    assert end_of(worker, config(policies=names, port_file=tmp_path / "port")) == ["ended"]
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())
    assert len([job for job in worker.submitted if isinstance(job, CreateAdapterJob)]) == 1


SCRIPT = """
import asyncio, sys, threading, time
sys.path.insert(0, {tests!r})
from server.fakes import FakeText, FakeWorker
from onebase.server.app import Parts, Report, serve
from onebase.server.config import EngineConfig, ServerConfig

class Hangs(FakeWorker):
    def drain(self, seconds):
        print("drains", flush=True)
        while not self.ticket:
            time.sleep(0.05)

    def stop(self, drain_seconds):
        threading.Event().wait()

    cut_off = lambda self: threading.Event().wait()

config = ServerConfig(engine=EngineConfig(model="fake"), port=0)
asyncio.run(serve(Parts(Hangs(), FakeText()), config, Report(ready=lambda port: print("ready", flush=True))))
"""


def test_a_second_signal_ends_the_process_at_once_whatever_hangs(tmp_path):
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "drains\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == CUT_OFF
    assert "told to stop again" in err


def test_last_checkpoints_that_hang_are_given_up(monkeypatch, caplog):
    monkeypatch.setattr(ending, "LAST_CHECKPOINTS_SECONDS", 0.3)
    monkeypatch.setattr("onebase.server.app.LAST_CHECKPOINTS_SECONDS", 0.3)
    with caplog.at_level(logging.WARNING), Live(config()) as live:

        async def hang():
            await asyncio.sleep(60)

        live.edge.keeper.close = hang
        live.begin_stop()
        live.join()
    assert live._server.exit_code == CUT_OFF


def test_a_server_that_ends_as_it_should_says_0():
    with Live(config()) as live:
        assert live.inference.Logprob(
            inference_pb2.LogprobRequest(adapter="base", sequences=[pair((9,), (7,))])
        ).adapter.name
        assert live.worker.wait_submitted(ScoreJob)
    assert live._server.exit_code == 0
