"""Two PPO runs through kills of their server: they end bit for bit as the undisturbed ones, and need nobody's help.

The server dies at failpoints: in the first step and in later ones, at each place that there is. Here one run goes
through some of them; `ONEBASE_FAULTS=all`, as `make faults` sets it, sends a run through every place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from oracle.fixtures import FIXTURES
from restarts.conftest import Start
from support import ONEBASE, RunningServer, environment, start_server

from onebase.client import connect
from onebase.server import failpoints
from onebase.trainer.attach import LEASE_SECONDS

pytestmark = pytest.mark.e2e
HIT = re.compile(r'failpoints\.hit\("(\w+)"')
STEPS = 4
WEIGHTS = {"up": 1.0, "down": -1.0}


ALL = os.environ.get("ONEBASE_FAULTS") == "all"
# The hits of a place begin anew with each server. Of the places of a checkpoint, the first server dies while the first
# policy is made, the second in the first optimizer step, the third in a later one; of the engine's, in the first of its
# steps, which may be while the server takes up its state, and in two later ones. Of the sessions', each server dies as
# the next of the two is opened, changed or closed.
COUNTS = {
    place: (1, 3, 4) if place.startswith(("before", "after", "during")) else (1, 5, 10) for place in failpoints.PLACES
} | {"noted": (1, 1, 1)}
KILLS = {place: [f"{place}:kill@{count}" for count in counts] for place, counts in COUNTS.items()}
SOME = {"some": ["before_rename:kill@3", "after_commit:kill@2", "moment", "after_rename:kill@5"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the tiny base; an optimizer step takes the gradients of two calls."""
    tmp_path = tmp_path_factory.mktemp("config")
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


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends what a test that failed left running."""
    for process in processes:
        process.kill()
        process.communicate()


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


def serve(state: Path, *flags: str, port: int = 0, failpoint: str = "") -> AbstractContextManager[RunningServer]:
    """A server whose every answered step is durable."""
    reward = f"reward={FIXTURES / 'reward'}"
    flags += ("--state", str(state), "--durability", "step", "--threads", "1", "--reward", reward)
    return start_server(FIXTURES / "base", *flags, port=port, failpoints=failpoint)


@dataclass(frozen=True)
class Undisturbed:
    """How both runs end if nothing happens."""

    weights: dict[str, dict[str, str]]
    numbers: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    with serve(folder / "state") as server:
        finish(trained(config, server.address, folder))
        found = weights(server.address, folder)
    return Undisturbed(found, {name: numbers(folder / name) for name in WEIGHTS})


def serve_until(kill: str, stack: ExitStack, state: Path, *flags: str, port: int) -> RunningServer | None:
    """A server that will die at this failpoint; None if that was while it loaded what it has."""
    try:
        return stack.enter_context(serve(state, *flags, port=port, failpoint="" if kill == "moment" else kill))
    except RuntimeError as error:
        if kill and f"({-signal.SIGKILL})" in str(error):
            return None
        raise


def wait_for_death(server: RunningServer, kill: str, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until the server is killed: at its failpoint, or here, soon after the next line of the first run's metrics."""
    there, until = len(lines(folder / "up")), time.monotonic() + 120
    while server.process.poll() is None:
        assert time.monotonic() < until, f"{kill} was never reached"
        assert any(one.poll() is None for one in processes), f"the runs ended before {kill}"
        if kill == "moment" and len(lines(folder / "up")) > there:
            time.sleep(0.03)
            server.process.kill()
        time.sleep(0.01)
    assert server.process.returncode == -signal.SIGKILL, server.text()


@pytest.mark.fault(times=1, training=True)
@pytest.mark.parametrize("kills", (KILLS if ALL else SOME).values(), ids=KILLS if ALL else SOME)
def test_two_runs_whose_server_is_killed_end_bit_for_bit_as_undisturbed_ones(
    kills: list[str],
    config: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    port: int,
    record_property: Callable[[str, object], None],
) -> None:
    state = tmp_path / "state"
    bucket = ("--checkpoints", f"file://{tmp_path / 'bucket'}") if kills[0].partition(":")[0].endswith("put") else ()
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(end, processes)
        for kill in kills:
            server = serve_until(kill, stack, state, *bucket, port=port)
            if server is not None:
                processes += () if processes else trained(config, server.address, tmp_path)
                wait_for_death(server, kill, processes, tmp_path)
            record_property("kill", kill)
        server = stack.enter_context(serve(state, *bucket, port=port))
        finish(processes)
        found = weights(server.address, tmp_path)
        assert "NO_GRADIENTS" not in server.text()
    assert found == undisturbed.weights
    assert found["up"] != found["down"]
    for name in WEIGHTS:
        assert numbers(tmp_path / name) == undisturbed.numbers[name]
        assert len(numbers(tmp_path / name)) == STEPS + 1  # with the evaluation before


def test_the_places_of_failpoints_are_all_there_are() -> None:
    package = Path(failpoints.__file__).parent
    hit = {place for file in package.rglob("*.py") for place in HIT.findall(file.read_text(encoding="utf-8"))}
    assert hit == set(failpoints.PLACES)


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
