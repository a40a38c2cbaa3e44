"""The trainer's state on disk."""

import json
import os
import stat

import numpy as np
import pytest

from onebase.trainer import checkpoint
from onebase.trainer.checkpoint import (
    SESSION_FILE,
    STATE_FILE,
    AdapterMark,
    TrainerState,
    load_session,
    load_state,
    save_session,
    save_state,
    sole_run,
    write_json,
)
from onebase.trainer.evaluation import Evaluation
from onebase.trainer.parsing import ConfigError


def make_state(**changes):
    rng = np.random.default_rng(5)
    rng.random(3)
    before = Evaluation(("a", [1, 2]), ("b", "c"), (0.1, -1 / 3), {"good": (0.1, 2.0)})
    fields = {
        "policy": "p",
        "step": 7,
        "prompts_taken": 56,
        "rng": rng.bit_generator.state,
        "algorithm": "ppo",
        "learner": {"kl_coef": 0.1 + 0.2, "moments": {"mean": 1 / 3, "count": 8.0}},
        "kl": 0.7,
        "before": before,
        "latest": None,
        "adapter": AdapterMark("/root/p/checkpoint-000007", 28, 1763798675.123456),
        "critic": AdapterMark("", 27, 1763798675.5),
    }
    return TrainerState(**fields | changes)


def test_a_state_is_read_as_it_was_written_to_the_last_bit(tmp_path):
    state = make_state()
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state
    rng = np.random.default_rng()
    rng.bit_generator.state = load_state(tmp_path).rng
    expected = np.random.default_rng(5)
    expected.random(3)
    assert rng.random() == expected.random()


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path) is None


def test_others_may_not_read_the_session_in_it(tmp_path):
    save_state(tmp_path, make_state())
    assert stat.S_IMODE((tmp_path / STATE_FILE).stat().st_mode) == 0o600


def test_a_crash_while_writing_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path, make_state(step=1))

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, make_state(step=2))
    monkeypatch.undo()
    assert load_state(tmp_path).step == 1
    assert os.listdir(tmp_path) == [STATE_FILE]


def test_what_is_renamed_was_synced_first(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_json(tmp_path / "x.json", {"a": 1})
    assert order == ["fsync", "replace", "fsync"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"before": null, "latest": null, "me": 1}', '{"before": {"me": 1}}'])
def test_a_file_that_is_no_state_is_refused_with_the_way_out(tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"resume: .*trainer_state\.json is not a trainer's state .*resume: never"):
        load_state(tmp_path)


def test_the_last_runs_session_is_known_to_its_owner_alone(tmp_path):
    assert load_session(tmp_path) == ""
    save_session(tmp_path, "first")
    save_session(tmp_path, "second")
    assert load_session(tmp_path) == "second"
    assert (tmp_path / SESSION_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / SESSION_FILE).write_text("{")
    assert load_session(tmp_path) == ""


def test_there_is_one_run_at_a_time_in_a_directory(tmp_path):
    refused = pytest.raises(ConfigError, match="output_dir: another run writes to")
    with sole_run(tmp_path), refused, sole_run(tmp_path):
        raise AssertionError
    with sole_run(tmp_path):
        pass
