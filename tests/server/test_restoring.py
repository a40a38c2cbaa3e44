"""What a start takes up, and what it goes back to: with a fake worker, in one process."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager

import pytest
from server.harness import refused
from server.stateful import StateWorker, committed, create, step, version

from onebase.server import checkpoints
from onebase.server.config import AdapterSource, ConfigError
from onebase.server.errors import ResourceExhausted, Unavailable
from onebase.server.store import Store
from onebase.v1 import adapters_pb2, sessions_pb2, types_pb2

STEP = {"durability": "step", "keep": 9}


@pytest.fixture
def start(serve):
    """Starts a server whose session has ended when it stops, and with it its leases."""

    @contextmanager
    def starts(**settings):
        with serve(**settings) as live:
            yield live
            live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=live.session))

    return starts


def trained(start, steps=3):
    """A state with an adapter of as many steps, each of them a checkpoint."""
    with start(**STEP) as live:
        create(live)
        for _ in range(steps):
            step(live)


def dies(live):
    """What is not durable yet is lost, as after kill -9."""
    live.keeper._tracks.clear()


def folders(tmp_path):
    return {path.name for path in (tmp_path / "state/checkpoints").iterdir()}


def damage(start, tmp_path, *versions):
    with start(**STEP) as live:
        rows = live.keeper._errands._store.submit(live.keeper.store.checkpoints).result()
    for row in rows:
        if row.version in versions:
            (tmp_path / "state/checkpoints" / row.folder / "onebase.json").write_text("{}")


def test_a_restore_is_done_once(start, caplog):
    trained(start)
    back = {**STEP, "restore": (("p", 1),)}
    with start(**back) as live:
        assert (version(live), committed(live)) == (4, [1, 0])  # the numbers of 1; 2 and 3 were given
        assert step(live).adapter.version == 5
        dies(live)
    for number in (5, 6):
        caplog.clear()
        with start(**back) as live:
            assert version(live) == number
            assert step(live).adapter.version == number + 1
            assert committed(live)[0] == number + 1
            dies(live)
        assert "restore p=1 was done at 2" in caplog.text
        assert "start once without it" in caplog.text


def test_a_kill_right_after_a_restore_takes_nothing_back(start):
    trained(start)
    for _ in range(2):
        with start(**STEP, restore=(("p", 1),)) as live:
            assert (version(live), committed(live)) == (4, [1, 0])
            dies(live)


def test_it_may_be_asked_for_again_after_a_start_without_it(start):
    trained(start)
    for first, wanted in ((4, [1, 0]), (6, [1, 0])):
        with start(**STEP, restore=(("p", 1),)) as live:
            assert (version(live), committed(live)) == (first, wanted)
            step(live)
            dies(live)
        with start(**STEP) as live:
            assert version(live) == first + 1
    with start(**STEP, restore=(("p", 0),)) as live:  # another version is another restore
        assert committed(live) == [0]
    with start(**STEP, restore=(("p", 0),)) as live:
        assert version(live) == 8


def test_what_was_done_may_be_gone(start):
    """Neither a checkpoint that has had its time nor a deleted adapter keeps a startr from starting again."""
    trained(start)
    back = {"durability": "step", "keep": 1, "restore": (("p", 1),)}
    with start(**back) as live:
        step(live)
        step(live)
        assert committed(live) == [6]
    with start(**back) as live:
        assert version(live) == 6
        live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="p"))
    with start(**back) as live:
        assert refused(version, live).reason == "ADAPTER_NOT_FOUND"


def test_several_are_done_each_once_and_all_can_be_before_one_is(start):
    trained(start)
    with start(**STEP) as live:
        create(live, "q")
        step(live, "q")
    with pytest.raises(ConfigError, match=r"'q=7': the state has checkpoints of version 1, 0"):
        start(**STEP, restore=(("p", 1), ("q", 7))).__enter__()
    with start(**STEP, restore=(("q", 0),)) as live:
        assert (version(live), version(live, "q")) == (3, 2)
        step(live, "q")
    with start(**STEP, restore=(("q", 0), ("p", 2))) as live:
        assert (version(live), version(live, "q")) == (4, 3)
        assert (committed(live), committed(live, "q")[0]) == ([2, 1, 0], 3)


def test_nothing_is_forgotten_where_the_chosen_one_is_damaged(start, tmp_path):
    trained(start)
    damage(start, tmp_path, 1)
    before = folders(tmp_path)
    with pytest.raises(ConfigError, match=r"'p=1': .*damaged.*nothing was changed; version 3, the newest, is whole"):
        start(**STEP, restore=(("p", 1),)).__enter__()
    assert folders(tmp_path) == before
    damage(start, tmp_path, 3)
    with pytest.raises(ConfigError, match=r"version 2 is whole: give p=2 to go on there"):
        start(**STEP, restore=(("p", 1),)).__enter__()
    assert folders(tmp_path) == before
    with start(**STEP, restore=(("p", 2),)) as live:
        assert (version(live), committed(live)) == (4, [2, 1, 0])


def test_nothing_is_forgotten_where_the_engine_cannot_have_it(start, tmp_path, monkeypatch):
    trained(start)
    before = folders(tmp_path)

    def refuses(*_):
        raise ResourceExhausted("OUT_OF_MEMORY", "there is no room for it")

    with monkeypatch.context() as patch:
        patch.setattr(StateWorker, "_LoadAdapterJob", refuses)
        with pytest.raises(ResourceExhausted, match="no room"):
            start(**STEP, restore=(("p", 1),)).__enter__()
    assert folders(tmp_path) == before
    with start(**STEP) as live:
        assert (version(live), committed(live)) == (3, [3, 2, 1, 0])


def test_nothing_is_forgotten_where_the_registry_cannot_note_it(start, tmp_path, monkeypatch):
    trained(start)

    sets = Store._set_meta

    def full(store, key, value):
        sets(store, key, value)
        if key == "restores":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_set_meta", full)
        with pytest.raises(ResourceExhausted, match="disk is full"):
            start(**STEP, restore=(("p", 1),)).__enter__()
    with start(**STEP) as live:
        assert (version(live), committed(live)) == (3, [3, 2, 1, 0])


def test_a_checkpoint_that_cannot_be_read_now_fails_the_start_and_is_not_called_damaged(start, monkeypatch):
    trained(start)

    def reads(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sha256", reads)
        with pytest.raises(Unavailable, match=r"adapter 'p': the checkpoint of version 3 .*Too many open files"):
            start(**STEP).__enter__()
    with start(**STEP) as live:
        assert version(live) == 3
        assert step(live).adapter.version == 4


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "r").mkdir()
    return AdapterSource("judge", tmp_path / "r")


def load(live, *, replace):
    request = adapters_pb2.LoadAdapterRequest(
        session_id=live.session, name="judge", path="r", kind=types_pb2.ADAPTER_KIND_REWARD, replace=replace
    )
    return live.adapters.LoadAdapter(request).version


def test_a_reward_of_the_settings_goes_on_after_those_that_clients_loaded_under_its_name(start, judge):
    with start() as live:
        assert [load(live, replace=again) for again in (False, True, True)] == [0, 1, 2]
    with start(rewards=(judge,)) as live:
        assert version(live, "judge") == 3
    with start(rewards=(judge,)) as live:
        assert version(live, "judge") == 3  # it is read from the same path
        assert load(live, replace=True) == 4
    with start(rewards=(judge,)) as live:
        assert version(live, "judge") == 5
        request = adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="judge")
        live.adapters.DeleteAdapter(request)
    with start() as live:
        assert load(live, replace=False) == 6


def test_what_the_settings_read_anew_is_not_restored(start, judge):
    with start() as live:
        load(live, replace=False)
    with pytest.raises(ConfigError, match="'judge=0': the settings read it anew"):
        start(rewards=(judge,), restore=(("judge", 0),)).__enter__()
    with start() as live:
        assert version(live, "judge") == 0
