"""Disks that are full, and disks that change what lies on them; for real, under a plain gRPC client."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from restarts.conftest import Start
from restarts.plain import STEP, Code, Plain, damage, kill, newest, refused

from server import harness

pytestmark = pytest.mark.e2e


@pytest.mark.fault(29, times=2)
def test_a_damaged_checkpoint_is_data_loss_and_the_one_before_is_offered(start: Start, state: Path) -> None:
    """Fault 29."""
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create("p")
        client.create("q")
        client.train("p")
        before = client.weights("p")
        client.train("p", number=1)
        kill(server)
    damage(newest(state, "p") / "adapter_model.safetensors")
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        for call in (client.forward, client.score, client.version):
            told = harness.refused(call, "p")
            assert (told.code, told.reason) == (Code.DATA_LOSS, "CHECKPOINT_DAMAGED")
            assert "version 1 is whole" in told.message
            assert "--restore p=1" in told.message
        assert refused(client.create, "p") == (Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
        client.train("q")  # serving goes on
    with start(*STEP, "--restore", "p=1") as server, Plain(server.address) as client:
        assert client.weights("p") == before
        assert client.version("p") == 3  # version 2 was given before, and means something else


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own, where this machine lets a test mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Takes all of the disk but some 40 KiB."""
    path, free = disk / "filler", os.statvfs(disk)
    with path.open("wb") as file:
        file.write(b"x" * (free.f_bavail * free.f_frsize - 40_000))
    return path


@pytest.mark.fault(28, times=2)
def test_a_full_disk_loses_nothing_and_passes(start: Start, state: Path, small_disk: Path) -> None:
    """Fault 28, on a real full disk: a step that is not durable is refused, until its retry makes it so."""
    state.symlink_to(small_disk)
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        before = client.weights()
        client.forward(number=1)
        filler = fill(small_disk)
        assert refused(client.step, request_id="two") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.step, request_id="two") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.create, "other") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.version, "other") == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        # The step is made, and nobody sees it before it is durable; serving goes on.
        assert refused(client.score, "p") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.forward, number=2) == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert client.version() == 1
        assert client.score().results
        kill(server)
    with start(*STEP) as server, Plain(server.address) as client:  # also on a full disk
        client.session = session
        assert (client.version(), client.weights()) == (1, before)
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        filler.unlink()
        answer = client.step(request_id="two")
        assert (answer.adapter.version, answer.gradients_applied) == (2, 1)
        after = client.weights()
        kill(server)
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        assert client.step(request_id="two") == answer
        assert (client.version(), client.weights()) == (2, after)
