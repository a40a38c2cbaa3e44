"""metrics.jsonl, samples.jsonl and TensorBoard's files."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onebase.trainer.logs import RunLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(directory, steps, last_step=None, offset=0.0):
    with RunLog(directory, last_step=last_step, tensorboard=True) as log:
        for step in steps:
            log.metrics(step, {"loss": step + offset, "ppo/val/error": -1.0})
            log.sample(step, {"prompt": "é", "reward": step + offset})


def scalars(directory, name="loss"):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_step_is_a_line_and_an_event(tmp_path):
    write_steps(tmp_path, [1, 2])
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0, "ppo/val/error": -1.0},
        {"step": 2, "loss": 2.0, "ppo/val/error": -1.0},
    ]
    assert lines(tmp_path / "samples.jsonl")[1] == {"step": 2, "prompt": "é", "reward": 2.0}
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert scalars(tmp_path, "ppo/val/error") == [(1, -1.0), (2, -1.0)]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [3, 4, 5], last_step=2, offset=0.5)
    expected = [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == expected
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 5]
    assert scalars(tmp_path) == expected


def test_a_run_that_begins_anew_drops_everything(tmp_path):
    write_steps(tmp_path, [0, 1, 2])
    write_steps(tmp_path, [0, 1], offset=0.5)
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [0.5, 1.5]
    assert scalars(tmp_path) == [(0, 0.5), (1, 1.5)]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path):
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    write_steps(tmp_path, [2], last_step=1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with RunLog(tmp_path, last_step=None, tensorboard=False) as log:
        log.metrics(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.0}]
    assert not list(tmp_path.glob("events.*"))
