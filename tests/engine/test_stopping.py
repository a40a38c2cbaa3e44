"""The worker's end: what hangs in the engine or in its files' threads keeps no server from ending."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine.conftest import generation, texts
from server.harness import Live, refusal_of, tokens_of

from onebase.server import worker as worker_module
from onebase.server.config import Budget, EngineConfig, Limits, ServerConfig
from onebase.server.ending import CUT_OFF
from onebase.server.engine import Engine
from onebase.server.errors import Unavailable
from onebase.server.jobs import AdamW, CreateAdapterJob, LoraSpec, OptimStepJob, SaveAdapterJob
from onebase.server.worker import Worker
from onebase.v1 import inference_pb2


@pytest.fixture
def go() -> Iterator[threading.Event]:
    """What hangs goes on after the test."""
    event = threading.Event()
    yield event
    event.set()


def hang_in(engine: Engine, monkeypatch: pytest.MonkeyPatch, go: threading.Event) -> threading.Event:
    """Steps of the engine hang; set when one does."""
    inside, real = threading.Event(), engine.step

    def step(*arguments: Any) -> Any:
        inside.set()
        go.wait()
        return real(*arguments)

    monkeypatch.setattr(engine, "step", step)
    return inside


@pytest.mark.fault(35)
@pytest.mark.parametrize("restart", [0.0, 600.0])
def test_a_server_whose_step_hangs_ends_when_it_is_told_to_stop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, go: threading.Event, restart: float
) -> None:
    inside = hang_in(engine, monkeypatch, go)
    config = ServerConfig(
        engine=EngineConfig(model="fake"), port=0, drain_seconds=0.5, stall_seconds=1, stall_restart_seconds=restart
    )
    with Live(config, Worker(engine, Limits(), Budget(256, 256))) as live:
        request = inference_pb2.GenerateRequest(
            adapter="base", prompts=[tokens_of(5, 6, 7)], sampling=inference_pb2.SamplingParams(max_new_tokens=2)
        )
        answers: Any = live.inference.Generate(request)
        assert inside.wait(20)
        live.begin_stop()
        with pytest.raises(grpc.RpcError) as told:
            list(answers)
        assert refusal_of(told.value).code is grpc.StatusCode.UNAVAILABLE
        live._thread.join(15)
        assert not live._thread.is_alive()
        assert live._server.exit_code == CUT_OFF


def test_a_file_that_hangs_does_not_keep_the_worker(
    engine: Engine, worker: Worker, monkeypatch: pytest.MonkeyPatch, go: threading.Event, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker_module, "JOIN_SECONDS", 0.5)
    monkeypatch.setattr(engine.formats, "save", lambda *_a, **_k: go.wait())
    job = SaveAdapterJob(adapter=1, path=tmp_path / "a")
    worker.submit(job)
    time.sleep(0.2)
    began = time.monotonic()
    worker.stop(0.0)
    assert time.monotonic() - began < 5
    assert worker.lost()
    assert isinstance(job.done.exception(5), Unavailable)


def test_what_is_cut_off_ends_and_only_saves_go_on(worker: Worker, tmp_path: Path) -> None:
    long, _ = generation(1, [texts(1)[0]], max_new_tokens=400, ignore_eos=True)
    worker.submit(long)
    steps = [OptimStepJob(adapter=uid, adamw=AdamW(0.1)) for uid in (1, 2)]
    for job in steps:
        worker.submit(job)
    worker.cut_off()
    assert all(job.done.done() for job in (long, *steps))
    assert isinstance(long.done.exception(), Unavailable)
    with pytest.raises(Unavailable):
        worker.submit(CreateAdapterJob(uid=9, name="x", lora=LoraSpec(), value_head=False))
    save = SaveAdapterJob(adapter=1, path=tmp_path / "a", with_optimizer=True)
    worker.submit(save)
    assert save.done.result(30).path.is_dir()
