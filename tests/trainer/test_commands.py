"""`onebase train`: what it prints, and how it fails."""

import io
import json
import subprocess
import sys

import pytest
import yaml
from rich.console import Console
from trainer.toy import ToyServer
from typer.testing import CliRunner

from onebase import client
from onebase.client import UnavailableError, Wait
from onebase.client.cli import app
from onebase.trainer import load_config, loop
from onebase.trainer.commands import EXAMPLE
from onebase.trainer.display import PlainDisplay


@pytest.fixture
def onebase():
    def run(*arguments):
        return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "80", "TERM": "dumb"})

    return run


@pytest.fixture
def config_file(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    path = tmp_path / "c.yaml"
    settings = {
        "prompts": {"path": str(prompts)},
        "rewards": [{"adapter": "good"}],
        "ppo": {"batch_size": 4, "mini_batch_size": 2},
        "steps": 2,
        "output_dir": str(tmp_path / "run"),
        "log": {"tensorboard": False},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_help_teaches_with_a_complete_example_whose_lines_are_whole(onebase):
    result = onebase("--help")
    assert result.exit_code == 0
    for line in EXAMPLE.splitlines():
        assert line in result.output


def test_print_config_gives_all_settings_in_a_form_that_can_be_read_again(onebase, config_file, tmp_path):
    result = onebase("--ppo.learning_rate", "1e-4", config_file, "--print-config", "--rewards.0.weight", "-1")
    assert result.exit_code == 0
    (tmp_path / "again.yaml").write_text(result.output)
    config = load_config(tmp_path / "again.yaml")
    assert config == load_config(config_file, [("ppo.learning_rate", "1e-4"), ("rewards.0.weight", "-1")])
    assert config.rewards[0].weight == -1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ppo.lerning_rate", "1"], "error: ppo.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        (["--steps"], "error: steps: the flag needs a value"),
        (["steps=3"], "cannot all be the one; write CONFIG.yaml --KEY VALUE"),
        (["--prompts.path", "gone.jsonl"], "error: prompts.path: gone.jsonl is not there"),
        (["--server", "nowhere"], "error: server: "),
        (["--reward_function", "gone.py:f"], "error: reward_function: gone.py is not there"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(onebase, config_file, arguments, message):
    result = onebase(config_file, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_trains_and_ends_with_what_came_of_it(onebase, config_file, tmp_path, monkeypatch):
    server = ToyServer()
    monkeypatch.setattr(loop, "_connect", lambda *_: server.client())
    result = onebase(config_file, "--steps", "3")
    assert result.exit_code == 0
    assert "step 3/3" in result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    expected = f"reward {summary['reward_before']:+.4f} before, {summary['reward_after']:+.4f} after"
    assert result.output.splitlines()[-1] == expected


def test_what_the_server_refuses_is_said_in_one_line(onebase, config_file, monkeypatch):
    server = ToyServer()
    monkeypatch.setattr(loop, "_connect", lambda *_: server.client())
    result = onebase(config_file, "--rewards.0.adapter", "nobody")
    assert result.exit_code == 1
    assert result.stderr == "error: no adapter 'nobody'\n"


def test_waiting_for_the_server_is_shown(config_file, monkeypatch):
    def connect(target, **settings):
        settings["on_wait"](Wait(target, UnavailableError("refused"), 600.0))
        settings["on_wait"](Wait(target, UnavailableError("refused"), 0.0, over=True, waited=30.0))
        return ToyServer().client()

    monkeypatch.setattr(client, "connect", connect)
    console = Console(width=200, file=io.StringIO())
    loop.train(load_config(config_file), display=PlainDisplay(console))
    begun, over, *_ = console.file.getvalue().splitlines()
    assert begun.startswith("127.0.0.1:7070 does not answer (UNAVAILABLE): waiting up to 10 min;")
    assert over == "127.0.0.1:7070 answers again, after 30 s"


def test_help_says_where_token_and_certificates_come_from(onebase):
    output = onebase("--help").output
    assert "ONEBASE_TOKEN" in output
    assert "ONEBASE_TLS_CA" in output


def test_importing_the_trainer_is_light():
    heavy = ("torch", "transformers", "datasets", "tensorboard", "tensorflow", "yaml", "pandas")
    code = f"import sys, onebase.trainer.commands; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
