from __future__ import annotations

import json

import pytest

from onebase.server import successor
from onebase.server.config import ConfigError, EngineConfig, ServerConfig, StateConfig
from onebase.server.successor import MOST, WITHIN, Restarts


class Replaced(Exception):
    pass


def config(**more):
    return ServerConfig(engine=EngineConfig(model="fake"), **more)


@pytest.fixture
def ended(monkeypatch):
    """What became of the process: its exit code, or the command of the next one."""
    seen = []

    def stop(what):
        seen.append(what)
        raise Replaced

    monkeypatch.setattr(successor.os, "_exit", stop)
    monkeypatch.setattr(successor.os, "execv", lambda path, command: stop([path, *command]))
    monkeypatch.setattr(successor.sys, "orig_argv", ["python", "-X", "dev", "-m", "onebase", "serve", "base"])
    monkeypatch.setattr(successor, "_leave_no_files_open", lambda: None)
    monkeypatch.setenv("ONEBASE_RESTARTS", "")
    monkeypatch.delenv("ONEBASE_RESTARTS")
    return seen


def test_a_port_that_was_free_is_kept_and_one_that_was_named_is_not_changed():
    left = Restarts((1.0,), 4711)
    assert left.keep_port(config(port=0)).port == 4711
    assert left.keep_port(config(port=7000)).port == 7000
    assert Restarts().keep_port(config(port=0)).port == 0


def test_restarts_are_counted_within_a_time():
    left = Restarts()
    for number in range(MOST):
        left = left.one_more(4711, 10.0 * number)
        assert len(left.times) == number + 1
    assert left.one_more(4711, 100.0) is None
    assert left.one_more(4711, WITHIN + 5.0).times == (10.0, 20.0, WITHIN + 5.0)


def test_a_server_with_a_state_is_replaced_by_its_own_command(ended, tmp_path, monkeypatch):
    with pytest.raises(Replaced):
        successor.end(config(state=StateConfig(tmp_path)), Restarts(), "t1", 4711)
    assert ended == [
        [successor.sys.executable, successor.sys.executable, "-X", "dev", "-m", "onebase", "serve", "base"]
    ]
    left = Restarts.inherited()
    assert (len(left.times), left.port) == (1, 4711)
    assert "ONEBASE_RESTARTS" not in successor.os.environ  # no child sees it
    assert Restarts.inherited() == Restarts()


def test_a_crash_that_comes_back_and_one_without_a_state_end_with_a_code_of_their_own(ended, tmp_path, caplog):
    with pytest.raises(Replaced):
        successor.end(config(), Restarts(), "t1", 4711)
    assert "t1" in caplog.text
    assert "--state" in caplog.text
    now = successor.time.monotonic()
    with pytest.raises(Replaced):
        successor.end(config(state=StateConfig(tmp_path)), Restarts((now,) * MOST, 4711), "t2", 4711)
    assert "t2" in caplog.text
    assert ended == [70, 70]


def test_what_is_left_is_plain_json(monkeypatch):
    monkeypatch.setenv("ONEBASE_RESTARTS", json.dumps({"times": [1.5], "port": 9}))
    assert Restarts.inherited() == Restarts((1.5,), 9)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_limit_of_stuck_steps_is_a_number(seconds):
    with pytest.raises(ConfigError, match="stall_restart_seconds"):
        config(stall_restart_seconds=seconds)
