"""Memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys

import psutil

_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Lets threads that begin from now on take the room that loading left, instead of heaps of their own.

    The one thread that makes tensors is not the one that loads the base. Only glibc has such heaps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def memory() -> tuple[int, int]:
    """Resident bytes now, and at their highest since the process began."""
    now = int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return now, max(now, peak_bytes)
