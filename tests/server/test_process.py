"""Memory and threads of a process."""

from __future__ import annotations

import gc

import psutil

from onebase.server import process


def test_what_is_there_is_not_looked_at_again() -> None:
    spared = [[] for _ in range(1000)]
    try:
        process.spare_what_stays()
        new: list[object] = []
        looked_at = {id(one) for one in gc.get_objects()}
        assert id(new) in looked_at
        assert not looked_at & {id(one) for one in spared}
    finally:
        gc.unfreeze()


def test_memory_is_this_process_s() -> None:
    now, peak = process.memory()
    assert abs(now - psutil.Process().memory_info().rss) < 2**24
    assert peak >= now
