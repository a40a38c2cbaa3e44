"""Two PPO runs through kills of their server: they end bit for bit as the undisturbed ones, and need nobody's help."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from restarts.conftest import Start
from support import ONEBASE, environment

from onebase.client import connect
from onebase.trainer.attach import LEASE_SECONDS

pytestmark = pytest.mark.e2e
STEPS = 4
WEIGHTS = {"up": 1.0, "down": -1.0}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A short run on the tiny base; an optimizer step takes the gradients of two calls."""
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "config.yaml"
    rows = [{"prompt": f"w{5 + i} w{40 - i} w{20 + 2 * i}"} for i in range(24)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ppo = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 2}
    settings = {
        "policy": {"name": "p", "rank": 4, "alpha": 8},
        "prompts": {"path": str(prompts)},
        "eval": {"samples": 8},
        "rewards": [{"adapter": "reward"}],
        "generation": {"max_new_tokens": 8},
        "ppo": {"learning_rate": 0.01, **ppo},
        "steps": STEPS,
        "log": {"tensorboard": False},
    }
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def trained(config: Path, address: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Starts both runs."""
    started = []
    for name, weight in WEIGHTS.items():
        flags = ("--server", address, "--policy.name", name, "--rewards.0.weight", str(weight))
        command = [*ONEBASE, "train", str(config), *flags, "--output_dir", str(folder / name)]
        started.append(subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    return started


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()


def weights(address: str, folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of each policy's tensors, optimizer included."""
    found = {}
    with connect(address) as client:
        for name in WEIGHTS:
            path = Path(client.download_adapter(name, folder / "weights" / name, with_optimizer=True).path)
            found[name] = {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.safetensors")
            }
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Everything that does not depend on the clock."""
    return [
        {key: value for key, value in line.items() if not key.startswith("time/") and "seconds" not in key}
        for line in lines(folder)
    ]


def wait_for_step(folder: Path, step: int) -> None:
    for _ in range(2400):
        if any(line["step"] >= step for line in lines(folder)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def test_two_runs_whose_server_is_killed_end_bit_for_bit_as_undisturbed_ones(
    config: Path, tmp_path: Path, start: Start, state: Path
) -> None:
    with start("--durability", "step") as server:
        finish(trained(config, server.address, tmp_path / "undisturbed"))
        wanted = weights(server.address, tmp_path / "undisturbed")
    state.rename(tmp_path / "state of the undisturbed")

    with ExitStack() as stack:
        server = stack.enter_context(start("--durability", "step"))
        processes = trained(config, server.address, tmp_path / "run")
        for step in (1, 2):
            wait_for_step(tmp_path / "run" / "up", step)
            time.sleep(0.03)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            server = stack.enter_context(start("--durability", "step"))
        finish(processes)
        found = weights(server.address, tmp_path / "run")
        assert "NO_GRADIENTS" not in server.text()
    assert found == wanted
    assert wanted["up"] != wanted["down"]
    for name in WEIGHTS:
        assert numbers(tmp_path / "run" / name) == numbers(tmp_path / "undisturbed" / name)
        assert len(numbers(tmp_path / "run" / name)) == STEPS + 1  # with the evaluation before


@pytest.mark.parametrize("saved", [False, True])
def test_a_trainer_that_is_killed_goes_on_at_once_when_it_is_started_again(
    config: Path, tmp_path: Path, start: Start, saved: bool
) -> None:
    """Also one that was killed before its first checkpoint: nobody waits for the ttl of the session that it left."""
    folder = tmp_path / "run"
    with start("--root", str(tmp_path / "root")) as server:
        flags = ("--server", server.address, "--output_dir", str(folder), "--steps", "500")
        command = [*ONEBASE, "train", str(config), *flags, "--save_every", str(int(saved))]
        run = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            wait_for_step(folder, 3)
        finally:
            run.kill()
            run.communicate()
        before, state = lines(folder), folder / "trainer_state.json"
        assert state.exists() == saved
        done = json.loads(state.read_text())["step"] if saved else 0
        began = time.monotonic()
        run = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while not (now := lines(folder)) or now[-1] in before or now[-1]["step"] < 1:
                assert run.poll() is None
                assert time.monotonic() - began < LEASE_SECONDS
                time.sleep(0.02)
            print(f"first step after {time.monotonic() - began:.1f} s")
            assert now[-1]["step"] == done + 1
        finally:
            run.send_signal(signal.SIGTERM)
            _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors.decode()
