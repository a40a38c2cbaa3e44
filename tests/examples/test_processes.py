"""No child is left when a demo ends, however it ends; a failing child's last words are shown."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import Child, ChildFailed, Children

FOREVER = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(600)"]
IGNORE = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
DEAF = [sys.executable, "-c", IGNORE]
FAILING = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]


def wait_for(path: Path) -> None:
    while not path.read_text(encoding="utf-8"):
        time.sleep(0.02)


def test_a_failing_child_is_noticed_with_its_last_words_and_nobody_is_left(tmp_path: Path) -> None:
    started: list[Child] = []

    def demo() -> None:
        with Children(tmp_path) as children:
            started.append(children.start("server", FOREVER, endless=True))
            children.start("trainer", FAILING).process.wait(30)
            children.check()

    with pytest.raises(ChildFailed, match=r"(?s)trainer ended with exit code 3.*what went wrong"):
        demo()
    assert not psutil.pid_exists(started[0].process.pid)


def test_an_endless_child_that_ends_is_a_failure(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        children.start("server", [sys.executable, "-c", "print('bye')"], endless=True).process.wait(30)
        with pytest.raises(ChildFailed, match=r"(?s)server ended, though.*bye"):
            children.check()


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
    with Children(tmp_path, grace=0.3) as children:
        child = children.start("deaf", DEAF)
        wait_for(child.log)
    assert child.process.returncode == -9
