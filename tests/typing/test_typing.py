"""A user's programs against the client's types, in a project of their own that knows nothing of this one's settings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import onebase.client
import onebase.trainer
import onebase.v1

HERE = Path(__file__).parent
PROGRAMS = ("sync_program.py", "async_program.py")
PACKAGES = (onebase.v1, onebase.client, onebase.trainer)
ROOTS = [str(Path(package.__path__[0]).parents[1]) for package in PACKAGES]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs, somewhere else."""
    folder = tmp_path_factory.mktemp("project")
    for path in HERE.glob("*.py"):
        if path.name != Path(__file__).name:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def mypy(project: Path) -> dict[str, dict[int, str]]:
    """What `mypy --strict` says of each program, by line."""
    settings = project / "mypy.ini"
    # A checkout's roots stand in for site-packages, of which mypy reports nothing either.
    settings.write_text(f"[mypy]\nmypy_path = {':'.join(ROOTS)}\n[mypy-onebase.*]\nfollow_imports = silent\n")
    cache = HERE.parents[1] / ".cache" / "mypy-user"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(settings), "--cache-dir", str(cache)]
    command += ["--output", "json", "--explicit-package-bases", *[*PROGRAMS, "mistakes.py"]]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, dict[int, str]] = {}
    for one in map(json.loads, done.stdout.splitlines()):
        if one["severity"] == "error":
            found.setdefault(one["file"], {})[one["line"]] = one["message"]
    return found


def mistakes() -> dict[int, str]:
    """The lines of mistakes.py that are mistakes."""
    lines = (HERE / "mistakes.py").read_text(encoding="utf-8").splitlines()
    return {number: line.strip() for number, line in enumerate(lines, 1) if "  # " in line}


@pytest.mark.parametrize("program", PROGRAMS)
def test_mypy_takes_a_users_program_and_infers_what_it_should(mypy: dict[str, dict[int, str]], program: str) -> None:
    assert mypy.get(program, {}) == {}


def test_mypy_finds_every_mistake_and_no_other(mypy: dict[str, dict[int, str]]) -> None:
    assert mypy["mistakes.py"].keys() == mistakes().keys(), mypy["mistakes.py"]


def test_pyright_takes_a_users_program_and_finds_every_mistake(project: Path) -> None:
    settings = {"typeCheckingMode": "strict", "extraPaths": ROOTS, "pythonVersion": "3.11"}
    (project / "pyrightconfig.json").write_text(json.dumps(settings))
    # basedpyright is pyright with its runtime packed in: pyright itself fetches that from the network
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(project)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=280)
    errors = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    found = {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in errors}
    assert found == {("mistakes.py", line) for line in mistakes()}, errors


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_say_that_they_are_typed(package: object) -> None:
    assert Path(package.__path__[0], "py.typed").exists()  # type: ignore[attr-defined]
