"""docs/reliability.md is what tests/faults/results.json says, every row of the table held, and counting can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import report
from faults.plugin import Tally
from faults.rows import ROWS
from support import environment

from onebase.server import failpoints

TESTS = Path(__file__).parents[1]
COMMITS = {"faults": "abc", "history": "abc", "fuzz": "abc"}


def test_the_page_is_what_was_found_and_everything_held() -> None:
    results = report.read()
    assert report.PAGE.read_text(encoding="utf-8") == report.page(results)
    assert report.wrong(results) == []
    assert list(results["faults"]) == [str(row) for row in ROWS]
    assert results["history"]["kills"] >= 200
    assert results["fuzz"]["inputs"] >= 100_000


SOME_TESTS = """
import pytest
from faults import told

@pytest.mark.fault(12)
def test_told():
    told.note("INVALID_ARGUMENT", "MALFORMED_MESSAGE")

@pytest.mark.fault(12, times=1)
def test_told_something_else():
    told.note("INTERNAL", "INTERNAL")

@pytest.mark.fault(5)
def test_nobody_is_told(record_property):
    record_property("kill", "after_commit:kill@3")

@pytest.mark.fault(9, 18)
@pytest.mark.parametrize("right", [True, False])
def test_fails(right, seen):
    seen("CANCELLED")
    assert right

@pytest.fixture
def untidy():
    yield
    raise AssertionError

@pytest.mark.fault(10)
def test_fails_afterwards(untidy, seen):
    seen("RESOURCE_EXHAUSTED", "QUEUE_FULL")

@pytest.mark.fault(28)
def test_cannot_be_tried_here():
    pytest.skip("no disk")

def test_of_something_else():
    raise AssertionError
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_tries_are_counted_and_hold_where_the_test_passes_and_the_client_was_told(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    out = tmp_path / "counts.json"
    flags = ("--faults-only", "--fault-times", "3", "--fault-results", str(out), *workers)
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "faults.plugin", "--rootdir", str(tmp_path), str(tmp_path), *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout
    found = json.loads(out.read_text())
    counts = {row: (one["tried"], one["held"], one["told"]) for row, one in found["faults"].items() if one["tried"]}
    assert counts == {
        "5": (3, 3, {}),
        "9": (6, 3, {"CANCELLED": 6}),
        "10": (3, 0, {"RESOURCE_EXHAUSTED QUEUE_FULL": 3}),
        "12": (4, 3, {"INVALID_ARGUMENT MALFORMED_MESSAGE": 3}),
        "18": (6, 0, {}),
    }
    assert any("test_told_something_else" in test for test in found["faults"]["12"]["failed"])
    assert found["training"] == {"tried": 3, "held": 3, "kills": 3, "places": {"after_commit": 3}}


@pytest.fixture
def good() -> dict[str, Any]:
    """A record of which nothing is wrong."""
    tally = Tally()
    for row, it in ROWS.items():
        tally.add([row], "test", passed=True, heard=it.told)
    rows = {str(row): report.fault(row, {**vars(count)}) for row, count in tally.counts.items()}
    return {
        "faults": rows,
        "training": {"tried": 1, "held": 1, "kills": 3, "places": dict.fromkeys(failpoints.PLACES, 3)},
        "tests": {"exit_code": 0, "skipped": []},
        "history": {
            "kills": 200,
            "wanted": 200,
            "sent": 12,
            "operations": 9,
            "violations": 0,
            "seed": 7,
            "exit_code": 0,
        },
        "fuzz": {"inputs": 10, "wanted": 10, "crashes": 0, "seed": 7, "exit_code": 0},
        "run": {"date": "2026-01-01", "machine": "a", "versions": "b", "seconds": 60, "commits": COMMITS},
    }


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("history", {"violations": 1}),
        ("history", {"violations": -1}),
        ("history", {"kills": 199}),
        ("history", {"exit_code": 1}),
        ("fuzz", {"crashes": 1}),
        ("fuzz", {"inputs": 9}),
        ("fuzz", {"exit_code": -9}),
        ("training", {"places": {"after_commit": 3}}),
        ("tests", {"exit_code": 1}),
        ("training", {"held": 0}),
        ("faults", {"30": {"tried": 0, "held": 0}}),
        ("faults", {"1": {"tried": 5, "held": 4, "failed": ["test"]}}),
    ],
)
def test_what_did_not_hold_is_said(good: dict[str, Any], part: str, changes: dict[str, Any]) -> None:
    assert report.wrong(good) == []
    good[part] = {**good[part], **changes}
    assert len(report.wrong(good)) == 1


def test_the_page_says_what_was_seen_and_how_to_do_it_again(good: dict[str, Any]) -> None:
    page = report.page(good)
    assert "--kills 200 --seed 7" in page
    assert sum(line.startswith(f"| {row} |") for row in ROWS for line in page.splitlines()) == len(ROWS)
    assert "`DATA_LOSS`" in page
