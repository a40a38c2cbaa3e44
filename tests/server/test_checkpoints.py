"""A state directory: one server at a time, damage noticed, leftovers swept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from onebase.server import checkpoints, directories
from onebase.server.checkpoints import StateDirectory, StateInUseError
from onebase.server.errors import DataLoss, Unavailable
from onebase.server.store import AdapterRow


@pytest.fixture(params=["disk", "url"])
def state(tmp_path, request):
    url = f"file://{tmp_path}/there" if request.param == "url" else ""
    directory = StateDirectory(tmp_path / "state", url)
    yield directory
    directory.close()


def lies(state, folder=""):
    """Where checkpoints lie in the end."""
    url = state.storage.url.removeprefix("file://")
    return (Path(url) if url else state.path / "checkpoints") / folder


def written(state, uid=1, version=3):
    path = state.fresh(uid)
    path.mkdir()
    (path / "weights").write_bytes(b"numbers")
    manifest = {"version": version, "sha256": {"weights": hashlib.sha256(b"numbers").hexdigest()}}
    (path / "onebase.json").write_text(json.dumps(manifest))
    return state.put(path, AdapterRow("p", uid, "policy", 0.0, ""), version)


def test_a_whole_checkpoint_is_fine(state):
    state.verify(written(state))


@pytest.mark.parametrize("file", ["weights", "onebase.json"])
@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_damage_is_noticed_in_every_file(state, file, harm):
    row = written(state)
    path = lies(state, row.folder) / file
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(DataLoss, match=r"version 3 is damaged") as caught:
        state.verify(row)
    assert caught.value.reason == "CHECKPOINT_DAMAGED"
    assert file in str(caught.value)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOMEM])
@pytest.mark.parametrize("file", ["weights", "onebase.json"])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(state, monkeypatch, number, file):
    row, read = written(state), checkpoints._sha256

    def reads(path):
        if path.name == file:
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sha256", reads)
        with pytest.raises(Unavailable, match=re.escape(os.strerror(number))) as caught:
            state.verify(row)
    assert caught.value.reason == "CHECKPOINT_UNREADABLE"
    assert caught.value.retry_after
    assert file in str(caught.value)
    state.verify(row)


def test_a_directory_that_is_made_outlives_a_power_cut(tmp_path, monkeypatch):
    """Each name that leads to it is synced, and the names in it."""
    synced, sync = [], directories.sync
    for module in (directories, checkpoints):
        monkeypatch.setattr(module, "sync", lambda path: synced.append(path) or sync(path))
    StateDirectory(tmp_path / "a/state").close()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a/state"]


def test_what_the_store_does_not_name_is_swept(state):
    kept, left = written(state), written(state, uid=2)
    half = lies(state, "000002-00112233aabb" if state.storage.url else f".{kept.folder}.0123.new")
    half.mkdir()
    assert sorted(state.sweep([kept.folder])) == sorted([left.folder, half.name])
    assert [one.name for one in lies(state).iterdir()] == [kept.folder]


def test_an_opened_checkpoint_is_on_this_disk_and_a_copy_goes_with_the_block(state):
    row = written(state)
    with state.opened(row.folder) as path:
        assert (path / "weights").read_bytes() == b"numbers"
    assert path.exists() == (not state.storage.url)


def test_a_checkpoint_is_fetched_once_to_be_verified_and_read(state, monkeypatch):
    row, fetched = written(state), []
    opened = state.storage.opened
    monkeypatch.setattr(state.storage, "opened", lambda name: fetched.append(name) or opened(name))
    with state.verified(row) as path:
        assert (path / "weights").read_bytes() == b"numbers"
    assert fetched == [row.folder]


def test_two_checkpoints_never_share_a_place(state):
    assert len({state.fresh(1).name for _ in range(100)}) == 100


def test_nobody_else_may_look_into_it(state):
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_a_second_server_is_refused_and_told_whom_to_stop(state):
    code = (
        "import pathlib, sys; from onebase.server.checkpoints import StateDirectory as S; S(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state.path)], capture_output=True, text=True)
    assert "StateInUseError" in done.stderr
    with pytest.raises(StateInUseError, match=r"process [0-9]+"):
        StateDirectory(state.path)
    state.close()
    state.close()
    StateDirectory(state.path).close()
