"""Counts how often each fault was tried and how often everything held, over a run of pytest.

A test says which rows of the table it shows by `@pytest.mark.fault(12)`; in tests/faults its name says it too
(`test_12_…`). A try is one run of such a test. It holds if the test passes and a client was told what the row promises;
one whose process died with it does not. A test that is skipped is no try, and is listed.

`fault(times=1, training=True)` says that a test is a training whose server is killed; it is counted apart, also where
it fails before the first kill.

    --fault-results FILE   write the counts there, as JSON; and how often trainings were killed, and where
    --fault-times N        run each test N times, but those of which `times` says less (`fault(14, times=1)`); the mark
                           is the function's, since one that is a parameter's would not be seen in time
    --faults-only          leave the tests out that show no fault
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from faults import told
from faults.rows import ROWS

_FAULTS, _TRAINING, KILL = "faults", "training", "kill"
"""Properties of a test: its rows with what was seen; that it is a training; a place where that was killed."""
_SHOWN = "faults_shown"
"""Where xdist's workers write what their tests show, for the case that they die."""
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
    skipped: list[str] = field(default_factory=list)
    """Tests that could not be tried on this machine."""


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

    def skip(self, rows: Iterable[int], test: str) -> None:
        """Takes in a test of these rows that was skipped."""
        for row in rows:
            self.counts[row].skipped.append(test)

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


def _is_training(item: Any) -> bool:
    return any(mark.kwargs.get("training") for mark in item.iter_markers("fault"))


def _shows(item: Any) -> bool:
    return bool(rows_of(item)) or item.get_closest_marker("fault") is not None


# ----------------------------------------------------------------------------------------------------- pytest's hooks


class Outcomes:
    """Where the outcomes come together: in the one process that there is, or in xdist's first."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tally = Tally()
        self._outcomes: dict[str, set[str]] = {}
        self._shown = tempfile.TemporaryDirectory(prefix=_SHOWN)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tells a worker where to write what its tests show."""
        node.workerinput[_SHOWN] = self._shown.name

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test when its teardown is over, or its worker is gone."""
        if report.when == "???":  # of xdist, which knows of a dead worker only which test it ran
            self._add(report.nodeid, *self._lost(report.nodeid), (), (), passed=False)
            return
        outcomes = self._outcomes.setdefault(report.nodeid, set())
        outcomes.add(report.outcome)
        if report.when != "teardown":
            return
        properties = dict(report.user_properties)
        rows, heard = properties.get(_FAULTS, ((), ()))
        if "skipped" in outcomes:  # what cannot be done on this machine was not tried
            self._tally.skip(rows, report.nodeid)
            return
        kills = [str(value) for name, value in report.user_properties if name == KILL]
        training = bool(kills) or _TRAINING in properties
        self._add(report.nodeid, rows, training, heard, kills, passed=outcomes == {"passed"})

    def _add(
        self,
        test: str,
        rows: Iterable[int],
        training: bool,
        heard: Iterable[str],
        kills: Sequence[str],
        *,
        passed: bool,
    ) -> None:
        self._tally.add(rows, test, passed=passed, heard=heard)
        if training:
            self._tally.trainings.add(kills, passed=passed)

    def _lost(self, test: str) -> tuple[list[int], bool]:
        """What a test shows, as its worker wrote when it had collected it."""
        for path in Path(self._shown.name).iterdir():
            found: dict[str, tuple[list[int], bool]] = json.loads(path.read_text(encoding="utf-8"))
            if test in found:
                return found[test]
        return [], False

    def pytest_sessionfinish(self) -> None:
        """Writes the counts, if somebody asked for them."""
        self._shown.cleanup()
        if self._path is not None:
            self._tally.write(self._path)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault-results", type=Path, help="write how often each fault was tried and held")
    group.addoption("--fault-times", type=int, default=1, help="run each test of a fault so often")
    group.addoption("--faults-only", action="store_true", help="leave out the tests that show no fault")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "fault(*rows, times=N, training=False): shows these rows of the table of faults (faults/rows.py)"
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
    for item in items:
        if any(mark.name == "fault" for mark in getattr(getattr(item, "callspec", None), "marks", ())):
            raise pytest.UsageError(f"{item.nodeid}: put `fault` on the function, or it is not repeated")
    if (worker := getattr(config, "workerinput", None)) is not None:
        shown = {item.nodeid: (rows_of(item), _is_training(item)) for item in items if _shows(item)}
        path = Path(worker[_SHOWN], worker["workerid"])
        path.write_text(json.dumps(shown), encoding="utf-8")
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
    if call.when == "teardown" and _is_training(item):
        item.user_properties.append((_TRAINING, True))
    return (yield)


@pytest.fixture
def seen() -> Callable[..., None]:
    """Notes what a client saw, where it was no refusal (`told.note`)."""
    return told.note


@pytest.fixture
def fault_try() -> int:
    """Which of its repetitions this is; --fault-times gives it."""
    return 0
