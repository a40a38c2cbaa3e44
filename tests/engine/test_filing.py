"""Adapters that are made, read and written: their copies are bounded, tenants take turns, and none is too late."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.conftest import generation, texts
from engine.test_mixed import row, train_rows

from onebase.server.engine import Engine
from onebase.server.errors import DeadlineExceeded, OnebaseError
from onebase.server.filing import Filing
from onebase.server.jobs import (
    AdamW,
    EvictAdapterJob,
    ForwardBackwardJob,
    OptimStepJob,
    PpoLoss,
    SaveAdapterJob,
    ScoreJob,
)
from onebase.server.worker import FILE_THREADS, Worker


@pytest.fixture
def slow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written when this is set."""
    go, real = threading.Event(), engine.formats.save

    def save(*arguments: Any, **named: Any) -> Any:
        go.wait(30)
        return real(*arguments, **named)

    monkeypatch.setattr(engine.formats, "save", save)
    yield go
    go.set()


@pytest.fixture
def snapshots(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The uids of the adapters that were copied."""
    taken: list[int] = []
    real = engine.snapshot

    def snapshot(uid: int, **named: Any) -> Any:
        taken.append(uid)
        return real(uid, **named)

    monkeypatch.setattr(engine, "snapshot", snapshot)
    return taken


def save_of(tmp_path: Path, number: int, **more: Any) -> SaveAdapterJob:
    return SaveAdapterJob(**{"adapter": 1, "path": tmp_path / str(number), "with_optimizer": True, **more})


def test_a_copy_is_made_only_when_a_thread_is_free_to_write_it(
    worker: Worker, slow: threading.Event, snapshots: list[int], tmp_path: Path
) -> None:
    saves = [save_of(tmp_path, number, tenant="red") for number in range(30)]
    for job in saves:
        worker.submit(job)
    other = save_of(tmp_path, 100, tenant="blue", adapter=2)
    worker.submit(other)
    score = ScoreJob(rows=[row(2, texts(1)[0])])
    worker.submit(score)
    score.done.result(30)
    assert sorted(snapshots) == [1] * (FILE_THREADS - 2) + [2]  # and blue's is begun beside red's thirty
    slow.set()
    assert all(job.done.result(60).path.is_dir() for job in (*saves, other))
    assert len(snapshots) == 31


def test_a_step_that_is_to_be_saved_is_copied_before_the_next_one_however_many_wait(
    worker: Worker, run: Callable[..., Any], slow: threading.Event, tmp_path: Path
) -> None:
    saves = [save_of(tmp_path, number, adapter=2) for number in range(10)]
    for job in saves:
        worker.submit(job)
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    first = run(OptimStepJob(adapter=1, adamw=AdamW(0.1), save_to=tmp_path / "step"))
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    assert run(OptimStepJob(adapter=1, adamw=AdamW(0.1))).version == first.version + 1
    slow.set()
    assert first.saved.result(30).version == first.version
    for job in saves:
        job.done.result(60)


def test_who_waits_for_a_thread_is_ended_by_a_cancel_or_a_deadline(
    worker: Worker, slow: threading.Event, tmp_path: Path
) -> None:
    for number in range(FILE_THREADS):
        worker.submit(save_of(tmp_path, number, tenant="red"))
    late = save_of(tmp_path, 100, tenant="red", deadline=time.monotonic() + 0.2)
    gone = save_of(tmp_path, 101, tenant="red")
    for job in (late, gone):
        worker.submit(job)
    gone.cancel()
    assert isinstance(late.done.exception(5), DeadlineExceeded)
    assert isinstance(gone.done.exception(5), OnebaseError)
    assert not slow.is_set()


def test_a_job_on_adapters_whose_deadline_has_passed_is_not_executed(worker: Worker, tmp_path: Path) -> None:
    job = save_of(tmp_path, 0, deadline=time.monotonic() - 0.01, client_state=b"late")
    worker.submit(job)
    assert isinstance(job.done.exception(10), DeadlineExceeded)
    assert not (tmp_path / "0").exists()


def test_a_reading_that_gets_no_thread_fails_its_jobs_and_nothing_else(
    engine: Engine, worker: Worker, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(save_of(tmp_path, 0, with_client_state=True))
    version = engine.adapters[1].weights.version
    here = tmp_path / "0"
    assert not run(EvictAdapterJob(adapter=1, version=version, open=lambda: contextlib.nullcontext(here))).resident

    def no_thread(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")

    other, _ = generation(2, [texts(1)[0][:5]], max_new_tokens=40, ignore_eos=True)
    worker.submit(other)
    with monkeypatch.context() as patch:
        patch.setattr(worker._files, "submit", no_thread)
        failed = ScoreJob(rows=[row(1, texts(1)[0])])
        worker.submit(failed)
        assert isinstance(failed.done.exception(20), OnebaseError)
    other.done.result(30)
    assert not worker.lost()
    run(ScoreJob(rows=[row(1, texts(1)[0])]))  # the next one tries again


def test_tenants_take_turns_for_a_thread() -> None:
    filing, order = Filing(3), []
    for number in range(6):
        filing.keep(SaveAdapterJob(adapter=number, path=Path("a"), tenant="red"))
    for number in range(6, 8):
        filing.keep(SaveAdapterJob(adapter=number, path=Path("a"), tenant="blue"))
    while (job := filing.next()) is not None:
        filing.ended(job)
        order.append(job.tenant)
    assert order.count("blue") == 2
    assert "blue" not in order[4:]
