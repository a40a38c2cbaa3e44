"""Ratios from interleaved pairs of process CPU time, and peaks of memory.

Other programs share the cores, clocks change, and the first run of anything is slow. So the two sides of a ratio run in
turn (A B A B …) in one process on one thread, the CPU's time is counted instead of the wall's, the medians make the
ratio, and the quartiles of the pairs' own ratios say how sure it is.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Work = Callable[[], object]
Clock = Callable[[], float]

LEAST_PAIRS = 3
"""Fewer say little about how sure a ratio is."""

LEAST_SLOW_PAIRS = 2
"""The same where one pair alone takes longer than all should: what runs that long varies less."""


class NotMeasured(Exception):
    """A figure that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Figure:
    """What a case found.

    Attributes:
        value: the ratio of medians, or the number itself where it is no ratio of times.
        low: lower quartile over the pairs.
        high: upper quartile.
        pairs: how many there were.
        detail: other numbers worth seeing, by name.
    """

    value: float
    low: float
    high: float
    pairs: int
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much a case may take: at most so many pairs, and about so many seconds of wall time."""

    pairs: int = 9
    seconds: float = 20.0


def over(
    numerators: Sequence[float], denominators: Sequence[float], detail: Mapping[str, float] | None = None
) -> Figure:
    """The ratio of the medians of two series that were measured in turn; quartiles over the pairs.

    Raises:
        ValueError: the series are empty, or of different lengths.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} measurements make no pairs")
    each = [a / b for a, b in zip(numerators, denominators, strict=True)]
    value = statistics.median(numerators) / statistics.median(denominators)
    low, high = quartiles(each)
    return Figure(value, low, high, len(each), dict(detail or {}))


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; a single number is both."""
    if len(numbers) == 1:
        return numbers[0], numbers[0]
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


def exactly(value: float, samples: int, detail: Mapping[str, float] | None = None) -> Figure:
    """A number that is no estimate."""
    return Figure(value, value, value, samples, dict(detail or {}))


def pairs(first: Work, second: Work, effort: Effort, clock: Clock = time.process_time) -> Figure:
    """Seconds of `first` over seconds of `second`, run in turn after one run of each to warm up.

    Args:
        first: one side.
        second: the other side.
        effort: how many pairs; fewer (but three, or two) where they would take too long.
        clock: CPU seconds of this process, all threads.
    """
    began = time.perf_counter()
    first(), second()
    each = time.perf_counter() - began
    least = LEAST_PAIRS if each < effort.seconds else LEAST_SLOW_PAIRS
    count = max(1, min(effort.pairs, max(least, int(effort.seconds / max(each, 1e-9)))))
    firsts, seconds = [], []
    for _ in range(count):
        firsts.append(timed(first, clock))
        seconds.append(timed(second, clock))
    sides = {"first_seconds": statistics.median(firsts), "second_seconds": statistics.median(seconds)}
    return over(firsts, seconds, sides)


def timed(work: Work, clock: Clock = time.process_time) -> float:
    """Seconds that the clock counts while the work runs; the garbage collector waits meanwhile."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        began = clock()
        work()
        return clock() - began
    finally:
        if enabled:
            gc.enable()


def peak_bytes(work: Work) -> int:
    """Most bytes of resident memory that the work held above what was held before it.

    Raises:
        NotMeasured: this system does not let a process reset its own peak.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is held now
    except OSError as error:
        raise NotMeasured(f"the peak of resident memory cannot be reset here: {error}") from error
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(key: str, pid: int | str = "self") -> int:
    """VmRSS or VmHWM of a process, in bytes.

    Raises:
        NotMeasured: this system does not tell.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise NotMeasured(f"resident memory is not told here: {error}") from error
    for line in lines:
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    raise NotMeasured(f"/proc/{pid}/status has no {key}")
