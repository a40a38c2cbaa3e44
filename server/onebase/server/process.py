"""Memory and threads of this process."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import resource
import sys

import psutil

_M_ARENA_MAX = -8

_SWITCH_SECONDS = 0.0005
"""An engine step lets go of the interpreter in each of its thousand operations. While many calls keep the event loop
busy, it waits for the interpreter so long each time; by Python's default of 5 ms a step takes seconds."""


def share_one_heap() -> None:
    """Lets threads that begin from now on take the room that loading left, instead of heaps of their own.

    The one thread that makes tensors is not the one that loads the base. Only glibc has such heaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def take_turns_quickly() -> None:
    """Has threads hand the interpreter to each other soon, so that a flood of calls does not hold up the engine."""
    sys.setswitchinterval(_SWITCH_SECONDS)


def spare_what_stays() -> None:
    """Has the collector of garbage leave alone what is there now: libraries and the base, 400,000 objects.

    To look at all of them takes a tenth of a second, in which nothing else runs, every few seconds under load. What is
    there now is never freed if it is in a cycle, so this is for a process that serves until it ends.
    """
    gc.collect(1)  # what was made of late: to look at all would make the start longer
    gc.freeze()


def memory() -> tuple[int, int]:
    """Resident bytes now, and at their highest since the process began."""
    now = int(_process(os.getpid()).memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return now, max(now, peak_bytes)


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)
