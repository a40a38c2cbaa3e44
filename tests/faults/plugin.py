"""Counts how often each fault was tried and how often everything held, over a run of pytest.

A test says which rows of the table it shows by `@pytest.mark.fault(12)`; in tests/faults its name says it too
(`test_12_…`). A try is one run of such a test. It holds if the test passes and a client was told what the row promises.

    --fault-results FILE   write the counts there, as JSON; and how often trainings were killed, and where
    --fault-times N        run each test N times, but those of which `times` says less (`fault(14, times=1)`)
    --faults-only          leave the tests out that show no fault
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults import told
from faults.rows import ROWS

_FAULTS, KILL = "faults", "kill"
"""Properties of a test: the rows that it shows with what was seen; a place where its training was killed."""
_NAMED = re.compile(r"test_(\d+)_")


@dataclass
class Count:
    """One row's outcome."""

    tried: int = 0
    held: int = 0
    told: dict[str, int] = field(default_factory=dict)
    """What clients saw, of that which the row promises; how often."""
    failed: list[str] = field(default_factory=list)
    """Tests that did not hold."""


@dataclass
class Trainings:
    """The runs whose server was killed."""

    tried: int = 0
    held: int = 0
    kills: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def add(self, places: Sequence[str], *, passed: bool) -> None:
        """Takes in one run, with the places (`after_commit:kill@3`) where its server was killed."""
        self.tried += 1
        self.held += passed
        self.kills += len(places)
        self.places = dict(Counter(self.places) + Counter(place.partition(":")[0] for place in places))


class Tally:
    """The outcomes of all rows, and of the trainings."""

    def __init__(self) -> None:
        self.counts = {row: Count() for row in ROWS}
        self.trainings = Trainings()

    def add(self, rows: Iterable[int], test: str, *, passed: bool, heard: Iterable[str]) -> None:
        """Takes in one try of these rows."""
        times = Counter(heard)
        for row in rows:
            count, promised = self.counts[row], ROWS[row].told
            right = {one: number for one, number in times.items() if one.partition(" ")[0] in promised}
            count.tried += 1
            if passed and (right or not promised):
                count.held += 1
            else:
                count.failed.append(test)
            count.told = dict(sorted((Counter(count.told) + Counter(right)).items()))

    def write(self, path: Path) -> None:
        """Writes them as JSON."""
        counts = {str(row): asdict(count) for row, count in self.counts.items()}
        found = {"faults": counts, "training": asdict(self.trainings)}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def rows_of(item: Any) -> tuple[int, ...]:
    """The rows that a test shows; it is a test's item, or its definition while it is being parametrized."""
    found = {row for mark in item.iter_markers("fault") for row in mark.args}
    if item.path.parent.name == "faults" and (named := _NAMED.match(item.name)):
        found.add(int(named[1]))
    unknown = found - set(ROWS)
    assert not unknown, f"{item.name}: rows {sorted(unknown)} are not in the table"
    return tuple(sorted(found))


def _shows(item: Any) -> bool:
    return bool(rows_of(item)) or item.get_closest_marker("fault") is not None


# ----------------------------------------------------------------------------------------------------- pytest's hooks


class Outcomes:
    """Where the outcomes come together: in the one process that there is, or in xdist's first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tally = Tally()
        self._outcomes: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test when its teardown is over."""
        outcomes = self._outcomes.setdefault(report.nodeid, set())
        outcomes.add(report.outcome)
        if report.when != "teardown" or "skipped" in outcomes:  # what cannot be done on this machine was not tried
            return
        passed = outcomes == {"passed"}
        for name, value in report.user_properties:
            if name == _FAULTS:
                rows, heard = value
                self._tally.add(rows, report.nodeid, passed=passed, heard=heard)
        if kills := [str(value) for name, value in report.user_properties if name == KILL]:
            self._tally.trainings.add(kills, passed=passed)

    def pytest_sessionfinish(self) -> None:
        """Writes the counts, if somebody asked for them."""
        if self._path is not None:
            self._tally.write(self._path)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault-results", type=Path, help="write how often each fault was tried and held")
    group.addoption("--fault-times", type=int, default=1, help="run each test of a fault so often")
    group.addoption("--faults-only", action="store_true", help="leave out the tests that show no fault")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(*rows, times=N): shows these rows of the table of faults (faults/rows.py)"
    )
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("--fault-results")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    times = metafunc.config.getoption("--fault-times")
    if times == 1 or not _shows(metafunc.definition):
        return
    most = [mark.kwargs["times"] for mark in metafunc.definition.iter_markers("fault") if "times" in mark.kwargs]
    metafunc.fixturenames.append("fault_try")
    metafunc.parametrize("fault_try", range(min([times, *most])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults-only"):
        config.hook.pytest_deselected(items=[item for item in items if not _shows(item)])
        items[:] = [item for item in items if _shows(item)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    told.TOLD.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # With the teardown, in which fixtures look whether the server lives; and by the way that xdist carries over.
    if call.when == "teardown" and (rows := rows_of(item)):
        item.user_properties.append((_FAULTS, (rows, list(told.TOLD))))
    return (yield)


@pytest.fixture
def seen() -> Callable[..., None]:
    """Notes what a client saw, where it was no refusal (`told.note`)."""
    return told.note


@pytest.fixture
def fault_try() -> int:
    """Which of its repetitions this is; --fault-times gives it."""
    return 0
