"""The wheel, installed into an empty environment, works as the checkout does."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support import environment, start_server

ROOT = Path(__file__).parents[2]
BASE = ROOT / "tests" / "oracle" / "fixtures" / "base"
REWARD = ROOT / "tests" / "oracle" / "fixtures" / "reward"

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel and its base dependencies, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True, timeout=280)
    return folder


def onebase(empty: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(empty / "bin" / "onebase"), *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )


def test_the_wheel_holds_the_four_packages_and_their_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("v1", "client", "trainer", "server"):
        assert f"onebase/{package}/py.typed" in names
    assert "onebase/__init__.py" not in names
    assert "onebase/v1/inference.proto" in names
    assert not [name for name in names if name.startswith(("tests", "examples"))]


def test_the_base_install_is_light_and_talks_to_a_server(empty: Path) -> None:
    code = "import importlib.util as u; import onebase.client; print(u.find_spec('torch'))"
    found = subprocess.run([str(empty / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"
    with start_server(BASE, "--reward", f"reward={REWARD}", "--threads", "1") as server:
        answer = onebase(empty, "reward", "w5 w6", " w7", "--server", server.address, "--json")
        assert answer.returncode == 0, answer.stderr
        assert isinstance(json.loads(answer.stdout.splitlines()[0]), dict)
        status = onebase(empty, "status", "--server", server.address)
        assert "reward" in status.stdout


def test_a_command_whose_extra_is_missing_says_what_to_install(empty: Path) -> None:
    for command, extra in (("serve", "server"), ("train", "trainer")):
        answer = onebase(empty, command, "x")
        assert answer.returncode == 1
        assert f"onebase[{extra}]" in answer.stderr + answer.stdout
