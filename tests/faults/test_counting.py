"""Tries that end before they could say anything are counted all the same, and tests that are skipped are listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

TESTS = Path(__file__).parents[1]

DYING = """
import os
import pytest

@pytest.mark.fault(12)
def test_dies():
    os._exit(3)

@pytest.mark.fault(times=1, training=True)
def test_of_a_training_dies():
    os._exit(3)

@pytest.mark.fault(times=1, training=True)
def test_of_a_training_fails_before_its_first_kill():
    raise AssertionError

@pytest.fixture
def undisturbed():
    raise AssertionError

@pytest.mark.fault(times=1, training=True)
def test_of_a_training_has_nothing_to_be_compared_with(undisturbed):
    pass

@pytest.mark.fault(28)
def test_cannot_be_tried_here():
    pytest.skip("no disk")
"""

UNSEEN = """
import pytest

@pytest.mark.parametrize("place", [pytest.param("here", marks=pytest.mark.fault(1))])
def test_is_marked_by_a_parameter(place):
    pass
"""


@pytest.fixture(autouse=True)
def the_server_lives() -> None:
    """None is needed here."""


def counted(folder: Path, text: str, *flags: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """How a run of these tests ended, and where it wrote its counts."""
    (folder / "test_some.py").write_text(text)
    out = folder / "counts.json"
    command = [sys.executable, "-m", "pytest", "-p", "faults.plugin", "--rootdir", str(folder), str(folder), *flags]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--faults-only", "--fault-times", "2", "--fault-results", str(out)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return done, out


def test_a_try_whose_process_died_and_a_training_that_never_began_did_not_hold(tmp_path: Path) -> None:
    done, out = counted(tmp_path, DYING, "-n", "2")
    assert done.returncode == 1, done.stdout
    found = json.loads(out.read_text())
    assert (found["faults"]["12"]["tried"], found["faults"]["12"]["held"]) == (2, 0)
    assert sum("test_dies" in test for test in found["faults"]["12"]["failed"]) == 2
    assert (found["faults"]["28"]["tried"], len(found["faults"]["28"]["skipped"])) == (0, 2)
    assert found["training"] == {"tried": 3, "held": 0, "kills": 0, "places": {}}


def test_a_mark_that_would_not_be_repeated_is_refused(tmp_path: Path) -> None:
    done, _ = counted(tmp_path, UNSEEN)
    assert done.returncode == 4, done.stdout
    assert "put `fault` on the function" in done.stdout + done.stderr
