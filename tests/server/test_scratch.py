"""Scratch directories of several servers of one user, some of them dead."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onebase.server.config import ConfigError
from onebase.server.scratch import Scratch

CHILD = """
import sys, time
from pathlib import Path
from onebase.server.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.fresh() / "file").write_text("x")
print("there", flush=True)
time.sleep(60)
"""


def test_of_dead_processes_nothing_stays_and_of_living_ones_everything(tmp_path):
    mine = Scratch(tmp_path / "all")
    kept = mine.fresh()
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "all"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "there\n"
    other = Scratch(tmp_path / "all")
    assert other.sweep() == []
    (theirs,) = (one for one in (tmp_path / "all").glob("*/*/file"))
    child.kill()
    child.wait()
    child.stdout.close()
    assert other.sweep() == [theirs.parent.parent.name]
    assert kept.is_dir()
    assert not theirs.exists()
    mine.close()
    mine.close()
    assert [one.name for one in (tmp_path / "all").iterdir()] == ["lock"]


@pytest.mark.parametrize("what", ["open to others", "a symlink"])
def test_a_directory_that_somebody_else_may_have_made_is_not_used(tmp_path, what):
    parent = tmp_path / "all"
    if what == "a symlink":
        (tmp_path / "real").mkdir(mode=0o700)
        parent.symlink_to(tmp_path / "real")
    else:
        parent.mkdir()
        parent.chmod(0o777)
    with pytest.raises(ConfigError, match="TMPDIR"):
        Scratch(parent).sweep()


def test_what_a_server_writes_is_its_users_alone(tmp_path):
    scratch = Scratch(tmp_path / "all")
    folder = scratch.fresh()
    assert [one.stat().st_mode & 0o077 for one in (folder, folder.parent, tmp_path / "all")] == [0, 0, 0]
    scratch.close()
