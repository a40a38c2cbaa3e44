"""No child is left when a demo ends, however it ends; a failing child's last words are shown."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import Child, ChildFailed, Children

FOREVER = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(600)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(600)",
]
FAILING = [sys.executable, "-c", "import time; time.sleep(0.3); print('what went wrong'); raise SystemExit(3)"]


def wait_for(path: Path) -> None:
    while not path.read_text(encoding="utf-8"):
        time.sleep(0.02)


def test_a_failing_child_ends_the_wait_for_another_and_leaves_nobody(tmp_path: Path) -> None:
    started: list[Child] = []

    def demo() -> None:
        with Children(tmp_path) as children:
            started.append(children.start("server", FOREVER))
            children.start("trainer", FAILING)
            children.wait(started[0], lambda: None, every=0.05)

    with pytest.raises(ChildFailed, match=r"(?s)trainer ended with code 3.*what went wrong"):
        demo()
    assert not psutil.pid_exists(started[0].process.pid)


def test_an_error_in_the_demo_itself_leaves_nobody(tmp_path: Path) -> None:
    started: list[Child] = []

    def demo() -> None:
        with Children(tmp_path) as children:
            started.append(children.start("server", FOREVER))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo()
    assert started[0].process.poll() is not None


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        child = children.start("deaf", DEAF)
        wait_for(child.log)
        child.stop(seconds=0.3)
    assert child.process.returncode == -9


def test_a_child_that_ends_well_ends_the_wait(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.wait(children.start("quick", [sys.executable, "-c", "print('done')"]), lambda: None, every=0.02)
    assert (tmp_path / "quick.log").read_text(encoding="utf-8") == "done\n"
