"""Places where a test can make a server fail: inert unless ONEBASE_FAILPOINTS names them.

    ONEBASE_FAILPOINTS=before_rename:kill@3,after_commit:kill

The Nth time (1 without @N) that a place is reached, its action is taken; a server that replaces itself goes on
counting. The actions:

    kill     the process ends as kill -9 ends it
    full     what a full disk raises
    oom      what torch raises on a CPU without memory
    crash    what ends a thread without a word
    bug      an exception that nobody expects
    poison   what a broken kernel leaves behind on CUDA
    hang     the thread goes on no more

The places, in their order:

    worker          the engine's thread begins a turn
    infer           a step's batch went through the base, and none of its numbers is kept
    train           the same, with gradients
    share           a prompt is in the cache, and not yet copied for those who share it
    optimizer       what an optimizer step needs is there, and nothing is changed
    snapshot        an adapter is about to be copied for a checkpoint
    files           a thread of the files begins
    store           the store's thread begins
    before_rename   a checkpoint is written and synced, and not yet in its place
    after_rename    it is in its place, and the registry does not know it; with --checkpoints nothing of it is there yet
    during_put      with --checkpoints: some of its files are there (a hit for each)
    after_put       with --checkpoints: all of them are, and the registry does not know it
    after_commit    the registry knows it, or that an adapter is deleted, and nobody was answered
    noted           the registry knows a session as it is now, or that it ended, and nobody was answered
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NoReturn

VARIABLE = "ONEBASE_FAILPOINTS"
HITS = "ONEBASE_FAILPOINT_HITS"
"""How often each place was reached before the process was replaced, as JSON."""

PLACES = (
    "worker",
    "infer",
    "train",
    "share",
    "optimizer",
    "snapshot",
    "files",
    "store",
    "before_rename",
    "after_rename",
    "during_put",
    "after_put",
    "after_commit",
    "noted",
)

_hits: Counter[str] = Counter(json.loads(os.environ.get(HITS, "{}")))
_lock = threading.Lock()


def hit(place: str) -> None:
    """Fails here if the environment says so. Any thread may call this.

    Raises:
        BaseException: the action's.
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
            _ACTIONS[action]()


def carry_over() -> None:
    """Lets the process that takes this one's place go on counting."""
    if os.environ.get(VARIABLE):
        os.environ[HITS] = json.dumps(_hits)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _oom() -> NoReturn:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "123456 bytes. Error code 12 (Cannot allocate memory)"
    )


def _crash() -> NoReturn:
    raise SystemExit(1)


def _bug() -> NoReturn:
    raise KeyError("a failpoint")


def _poison() -> NoReturn:
    raise RuntimeError("CUDA error: device-side assert triggered")


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


_ACTIONS: Mapping[str, Callable[[], None]] = {
    "kill": _kill,
    "full": _full,
    "oom": _oom,
    "crash": _crash,
    "bug": _bug,
    "poison": _poison,
    "hang": _hang,
}
