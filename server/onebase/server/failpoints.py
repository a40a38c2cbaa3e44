"""Places where a test can make a server fail: inert unless ONEBASE_FAILPOINTS names them.

    ONEBASE_FAILPOINTS=before_rename:kill@3,after_commit:kill

The Nth time (1 without @N) that a place is reached, its action is taken: `kill` ends the process as kill -9 does,
`full` raises what a full disk raises. The places, in their order:

    before_rename   a checkpoint is written and synced, and not yet in its place
    after_rename    it is in its place, and the registry does not know it; with --checkpoints nothing of it is there yet
    during_put      with --checkpoints: some of its files are there (a hit for each)
    after_put       with --checkpoints: all of them are, and the registry does not know it
    after_commit    the registry knows it, and nobody was answered
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter

VARIABLE = "ONEBASE_FAILPOINTS"

_hits: Counter[str] = Counter()
_lock = threading.Lock()


def hit(place: str) -> None:
    """Fails here if the environment says so. Any thread may call this.

    Raises:
        OSError: ENOSPC, for `full`.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    with _lock:
        _hits[place] += 1
        count = _hits[place]
    for one in wanted.split(","):
        name, _, action = one.partition(":")
        action, _, number = action.partition("@")
        if name == place and count == int(number or 1):
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
