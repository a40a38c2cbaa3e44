"""What a trainer keeps with its adapter: changes with a step and with nothing else, and goes through files whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine.conftest import Run
from engine.test_files import step
from engine.test_mixed import train_rows

from onebase.server.engine import Engine
from onebase.server.errors import DataLoss, FailedPrecondition, InvalidArgument
from onebase.server.jobs import (
    MAX_CLIENT_STATE,
    AdamW,
    AdapterKind,
    ClientState,
    ClientStateJob,
    ForwardBackwardJob,
    LoadAdapterJob,
    OptimStepJob,
    PpoLoss,
    SaveAdapterJob,
)

NONE = ClientState()


def train(run: Run, state: bytes | None, rate: float = 0.1) -> None:
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    run(OptimStepJob(adapter=1, adamw=AdamW(rate), client_state=state))


def kept(run: Run, uid: int = 1) -> ClientState:
    found: ClientState = run(ClientStateJob(adapter=uid))
    return found


def load(run: Run, path: Path, uid: int, least: int = 0, optimizer: bool = True) -> ClientState:
    job = LoadAdapterJob(
        uid=uid, name="l", kind=AdapterKind.POLICY, path=path, with_optimizer=optimizer, least_version=least
    )
    run(job)
    return kept(run, uid)


def save(run: Run, path: Path, **more: bool) -> Path:
    run(SaveAdapterJob(adapter=1, path=path, **{"with_optimizer": True, "with_client_state": True, **more}))  # type: ignore[arg-type]
    return path


def test_it_changes_with_the_step_that_brings_another_and_with_no_other(run: Run, engine: Engine) -> None:
    assert kept(run) == NONE
    train(run, b"one")
    step(run, 1)
    assert kept(run) == ClientState(b"one", 1)
    for failing in (OptimStepJob(adapter=1, adamw=AdamW(0.1), client_state=b"lost"),):  # without gradients
        with pytest.raises(FailedPrecondition):
            run(failing)
    assert kept(run) == ClientState(b"one", 1)
    train(run, b"two")
    assert kept(run) == ClientState(b"two", 3)
    train(run, b"")
    assert kept(run).data == b""
    assert kept(run, 2) == NONE


def test_it_goes_through_files(run: Run, tmp_path: Path) -> None:
    train(run, bytes(range(256)))
    saved = save(run, tmp_path / "saved")
    assert (saved / "client_state.bin").read_bytes() == bytes(range(256))
    assert load(run, saved, 10) == ClientState(bytes(range(256)), 1)
    assert load(run, saved, 11, least=7) == ClientState(bytes(range(256)), 7)  # it belongs to the version it came with
    assert load(run, saved, 12, optimizer=False) == NONE
    step(run, 1)
    assert load(run, save(run, tmp_path / "later"), 13, least=9) == ClientState(bytes(range(256)), 1)
    assert load(run, save(run, tmp_path / "another's", with_client_state=False), 14) == NONE


def test_what_a_save_brings_is_in_it_and_stays(run: Run, tmp_path: Path) -> None:
    step(run, 1)
    job = SaveAdapterJob(
        adapter=1, path=tmp_path / "saved", with_optimizer=True, with_client_state=True, client_state=b"mine"
    )
    run(job)
    assert (tmp_path / "saved" / "client_state.bin").read_bytes() == b"mine"
    assert kept(run) == ClientState(b"mine", 1)


def test_damage_and_length_are_noticed(run: Run, tmp_path: Path) -> None:
    train(run, b"state")
    saved = save(run, tmp_path / "saved")
    (saved / "client_state.bin").write_bytes(b"stale")
    with pytest.raises(DataLoss, match="client_state"):
        load(run, saved, 10)
    (saved / "client_state.bin").write_bytes(bytes(MAX_CLIENT_STATE + 1))
    with pytest.raises(InvalidArgument, match=str(MAX_CLIENT_STATE)):
        load(run, saved, 11)
    manifest = json.loads((saved / "onebase.json").read_text())
    (saved / "onebase.json").write_text(json.dumps({**manifest, "client_state": "x"}))
    with pytest.raises(InvalidArgument, match="client_state is 'x'"):
        load(run, saved, 12)
