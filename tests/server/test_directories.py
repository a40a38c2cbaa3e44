"""Directories that are exchanged in one step, and made so that a power cut does not take them back."""

from __future__ import annotations

import errno
import os

import pytest

from onebase.server import directories
from onebase.server.directories import exchange, make


@pytest.fixture
def two(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def test_two_names_trade_what_they_mean(two):
    if not exchange(str(two / "one"), str(two / "other")):
        pytest.skip("this system, or the file system, cannot exchange")
    assert [(two / name / "file").read_text() for name in ("one", "other")] == ["other", "one"]


def test_one_of_them_may_be_named_in_a_directory_that_is_held_open(two):
    held = os.open(two, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not exchange(str(two / "one"), "other", other_in=held):
            pytest.skip("this system, or the file system, cannot exchange")
    finally:
        os.close(held)
    assert [(two / name / "file").read_text() for name in ("one", "other")] == ["other", "one"]


def test_what_is_not_there_is_told(two):
    if directories._renameat2 is None:
        pytest.skip("this system cannot exchange")
    with pytest.raises(FileNotFoundError):
        exchange(str(two / "one"), str(two / "nothing"))
    assert (two / "one/file").read_text() == "one"


@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOSYS])
def test_where_it_cannot_be_had_nothing_changes(two, monkeypatch, number):
    def refuses(*_):
        directories.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(directories, "_renameat2", None if number is None else refuses)
    assert not exchange(str(two / "one"), str(two / "other"))
    assert [(two / name / "file").read_text() for name in ("one", "other")] == ["one", "other"]


def test_each_directory_that_is_made_is_kept_by_the_one_above_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(directories, "sync", synced.append)
    make(tmp_path / "a/b/c", 0o700)
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o700
    make(tmp_path / "a/b/c")
    assert len(synced) == 3
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make(tmp_path / "file" / "below")
