"""Memory of this process."""

from __future__ import annotations

import resource
import sys

import psutil


def memory() -> tuple[int, int]:
    """Resident bytes now, and at their highest since the process began."""
    now = int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return now, max(now, peak_bytes)
