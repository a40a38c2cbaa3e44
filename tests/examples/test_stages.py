"""A stage is made once, kept while nothing it is made of changes, and made again when something does."""

from __future__ import annotations

import dataclasses
from io import StringIO
from pathlib import Path

import pytest
from common import read_record, write_json
from processes import ChildFailed, Children
from rich.console import Console
from stages import Stage, demo_stages, run_stage

SCRIPT = """
import json, sys, pathlib
output = pathlib.Path(sys.argv[1])
output.mkdir(exist_ok=True)
with (output / "runs").open("a") as file:
    file.write("x")
(output.parent / (output.name + ".json")).write_text(json.dumps({"loss": 0.5}))
"""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    script = tmp_path / "make.py"
    script.write_text(SCRIPT, encoding="utf-8")
    output = tmp_path / "made"
    return Stage("making", output, script, (str(output),))


def run(stage: Stage) -> str:
    screen = StringIO()
    with Children(stage.script.parent / "logs") as children:
        run_stage(stage, children, Console(file=screen, width=200))
    return screen.getvalue()


def times_made(stage: Stage) -> int:
    return len((stage.output / "runs").read_text(encoding="utf-8"))


def test_a_stage_is_made_once_and_then_kept(stage: Stage) -> None:
    assert not stage.is_done
    run(stage)
    assert stage.is_done
    assert "kept" in run(stage)
    assert times_made(stage) == 1
    assert read_record(stage.output)["loss"] == 0.5


def test_a_changed_script_source_argument_or_need_makes_it_again(stage: Stage, tmp_path: Path) -> None:
    run(stage)
    source = tmp_path / "words.py"
    source.write_text("words = 1", encoding="utf-8")
    others = [
        dataclasses.replace(stage, arguments=(*stage.arguments, "--seed")),
        dataclasses.replace(stage, sources=(source,)),
        dataclasses.replace(stage, needs=(stage,)),
    ]
    assert [other.is_done for other in others] == [False, False, False]
    before = others[1].fingerprint()
    source.write_text("words = 2", encoding="utf-8")
    assert others[1].fingerprint() != before
    stage.script.write_text(SCRIPT + "# changed", encoding="utf-8")
    run(stage)
    assert times_made(stage) == 2


def test_an_output_that_was_made_by_hand_or_lost_is_made_again(stage: Stage) -> None:
    run(stage)
    write_json(stage.output.with_name("made.json"), {"loss": 0.4})
    assert not stage.is_done
    run(stage)
    (stage.output / "runs").unlink()
    stage.output.rmdir()
    assert not stage.is_done


def test_a_stage_that_fails_or_writes_no_record_is_not_done(stage: Stage) -> None:
    stage.script.write_text("raise SystemExit('no such data')", encoding="utf-8")
    with pytest.raises(ChildFailed, match="no such data"):
        run(stage)
    stage.script.write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir()", encoding="utf-8")
    with pytest.raises(ChildFailed, match="wrote no"):
        run(stage)
    assert not stage.is_done


def test_the_stages_of_the_demo_stand_on_each_other(tmp_path: Path) -> None:
    data, base, reward = demo_stages(tmp_path)
    assert base.needs == (data,)
    assert reward.needs == (data, base)
    assert all(source.is_file() for stage in (data, base, reward) for source in (stage.script, *stage.sources))
