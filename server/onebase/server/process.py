"""Memory and threads of this process."""

from __future__ import annotations

import ctypes
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


def memory() -> tuple[int, int]:
    """Resident bytes now, and at their highest since the process began."""
    now = int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return now, max(now, peak_bytes)
