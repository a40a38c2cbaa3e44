"""Real `onebase train` processes against a real server: two at once, killed, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import FIXTURES
from support import ONEBASE, environment, start_server

from onebase.client import connect

pytestmark = pytest.mark.e2e
STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A short run on the tiny base."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{5 + i} w{40 - i} w{20 + 2 * i}"} for i in range(24)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
                "policy": {"name": "p", "rank": 4, "alpha": 8},
                "prompts": {"path": str(prompts)},
                "eval": {"samples": 8},
                "rewards": [{"adapter": "reward"}],
                "generation": {"max_new_tokens": 8},
                "ppo": {"learning_rate": 0.01, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2},
                "steps": STEPS,
                "save_every": 2,
                "log": {"tensorboard": False},
            }
        ),
        encoding="utf-8",
    )
    return path


def train(config: Path, address: str, name: str, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [*ONEBASE, "train", str(config), "--server", address, "--policy.name", name, "--output_dir", str(folder)]
    return subprocess.Popen([*command, *flags], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Every step's statistics that do not depend on the clock or on how often the adapter was loaded."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    volatile = ("time/", "seconds", "adapter_version")
    steps = [line for line in lines if line["step"]]  # step 0 is the evaluation before
    return [{key: value for key, value in line.items() if not key.startswith(volatile)} for line in steps]


def wait_for_state(folder: Path, step: int) -> None:
    """Until a checkpoint of at least this step is written."""
    path = folder / "trainer_state.json"
    for _ in range(1200):
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step}")


def test_two_trainings_at_once_give_what_each_gives_alone(config: Path, tmp_path: Path) -> None:
    reward = ("--reward", f"reward={FIXTURES / 'reward'}", "--threads", "1")
    weights = {"up": "1", "down": "-1"}
    with start_server(FIXTURES / "base", *reward, "--root", str(tmp_path)) as server:
        for name, weight in weights.items():
            finish(
                train(config, server.address, f"{name}_alone", tmp_path / f"{name}_alone", "--rewards.0.weight", weight)
            )
        both = [
            train(config, server.address, name, tmp_path / name, "--rewards.0.weight", weight)
            for name, weight in weights.items()
        ]
        for process in both:
            finish(process)
        with connect(server.address) as client:
            assert {a.name: a.version for a in client.adapters("policy")} == dict.fromkeys(
                ("up", "down", "up_alone", "down_alone"), 4 * STEPS
            )
    for name in weights:
        assert numbers(tmp_path / name) == numbers(tmp_path / f"{name}_alone")
        assert len(numbers(tmp_path / name)) == STEPS
    assert numbers(tmp_path / "up") != numbers(tmp_path / "down")


@pytest.mark.parametrize("blow", ["kill -9 the trainer", "SIGTERM the trainer", "kill -9 trainer and server"])
def test_a_resumed_run_ends_as_an_undisturbed_one(config: Path, tmp_path: Path, blow: str) -> None:
    flags = ("--reward", f"reward={FIXTURES / 'reward'}", "--threads", "1", "--root", str(tmp_path))
    with start_server(FIXTURES / "base", *flags) as server:
        finish(train(config, server.address, "p", tmp_path / "undisturbed"))
    with start_server(FIXTURES / "base", *flags) as server:
        process = train(config, server.address, "p", tmp_path / "run", "--steps", "600")
        wait_for_state(tmp_path / "run", 2)
        process.send_signal(signal.SIGTERM if blow.startswith("SIGTERM") else signal.SIGKILL)
        process.communicate(timeout=60)
        assert (process.returncode == 0) == blow.startswith("SIGTERM")
        state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
        steps = max(STEPS, state["step"] + 2)
        if not blow.endswith("server"):
            finish(train(config, server.address, "p", tmp_path / "run", "--steps", str(steps)))
        else:
            os.kill(server.process.pid, signal.SIGKILL)
    if blow.endswith("server"):
        with start_server(FIXTURES / "base", *flags) as server:
            finish(train(config, server.address, "p", tmp_path / "run", "--steps", str(steps)))
    found, wanted = numbers(tmp_path / "run"), numbers(tmp_path / "undisturbed")
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    for line in (*found, *wanted):  # the undisturbed run is evaluated after its last step
        for key in [key for key in line if key.startswith("eval/")]:
            del line[key]
    assert found[:STEPS] == wanted


def test_a_config_error_is_one_line(config: Path, tmp_path: Path) -> None:
    process = train(config, "127.0.0.1:1", "p", tmp_path / "x", "--ppo.learning_rat", "1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"learning_rate" in errors
    assert b"Traceback" not in errors


VARIANTS = {
    "grpo": "--algorithm grpo --grpo.batch_size 8 --grpo.mini_batch_size 4 --grpo.num_generations 4 "
    "--grpo.num_iterations 2 --grpo.beta 0.05 --grpo.learning_rate 0.01",
    "rloo": "--algorithm rloo --rloo.batch_size 8 --rloo.mini_batch_size 4 --rloo.num_generations 4 "
    "--rloo.num_iterations 2 --rloo.learning_rate 0.01",
    "ppo with a critic": "--critic.name c --critic.init_from reward",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_trainings_too_end_as_undisturbed_ones(config: Path, tmp_path: Path, variant: str) -> None:
    """Trainer and server are killed after a checkpoint; of the adapters, a critic among them, only files are left."""
    flags = VARIANTS[variant].split()
    serve = ("--reward", f"reward={FIXTURES / 'reward'}", "--threads", "1", "--root", str(tmp_path))
    with start_server(FIXTURES / "base", *serve) as server:
        finish(train(config, server.address, "p", tmp_path / "undisturbed", *flags))
    with start_server(FIXTURES / "base", *serve) as server:
        process = train(config, server.address, "p", tmp_path / "run", *flags, "--steps", "600")
        wait_for_state(tmp_path / "run", 2)
        process.kill()
        process.communicate(timeout=60)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["critic"] is not None) == ("critic" in variant)
    steps = max(STEPS, state["step"] + 2)
    with start_server(FIXTURES / "base", *serve) as server:
        finish(train(config, server.address, "p", tmp_path / "run", *flags, "--steps", str(steps)))
    found, wanted = numbers(tmp_path / "run"), numbers(tmp_path / "undisturbed")
    for line in (*found, *wanted):
        for key in [key for key in line if key.startswith("eval/")]:
            del line[key]
    assert found[:STEPS] == wanted
