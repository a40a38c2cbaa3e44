from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import typer
from server.fakes import FACTS, FakeText, FakeWorker
from typer.testing import CliRunner

from onebase.server import app, commands
from onebase.server.app import Parts
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import Pooling


@pytest.fixture
def run(monkeypatch):
    """Runs `serve` with a fake base, which stops as soon as it serves; returns exit code, output and configs."""
    seen = []

    def open_parts(config):
        seen.append(config)
        return Parts(FakeWorker(), FakeText())

    async def serve(parts, config, report):
        async with app.running(parts, config, report):
            pass

    monkeypatch.setattr(app, "open_parts", open_parts)
    monkeypatch.setattr(app, "serve", serve)
    command = typer.Typer()
    command.command()(commands.serve)

    def run(*arguments):
        result = CliRunner().invoke(command, [*arguments], env={"COLUMNS": "200", "TERM": "dumb"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output, seen

    return run


def test_it_tells_what_it_does(run, tmp_path):
    code, output, (config,) = run(
        "model", "--reward", f"r1={tmp_path}/r", "--policy", "p1", "--policy", f"p2={tmp_path}/p", "--port", "0",
        "--root", str(tmp_path), "--policy-rank", "4", "--policy-alpha", "8", "--kv-slots", "3", "--step-tokens", "64",
        "--max-context", "77", "--threads", "1", "--drain-seconds", "2", "--dtype", "float32", "--device", "cpu",
        "--quantization", "nf4", "--max-upload-bytes", "4096",
    )  # fmt: skip
    assert code == 0, output
    assert "FakeForCausalLM" in output
    assert f"reward r1: rank 16, score head of 1, 1001 B, from {tmp_path}/r" in output
    assert "policy p1: rank 4, value head, 1002 B, fresh" in output
    assert "Serving on 127.0.0.1:" in output
    assert "onebase status --server 127.0.0.1:" in output
    assert "Stopped." in output
    assert [source.name for source in (*config.rewards, *config.policies)] == ["r1", "p1", "p2"]
    assert (config.roots, config.policy_rank, config.policy_alpha, config.drain_seconds) == ((tmp_path,), 4, 8, 2)
    engine = config.engine
    assert (engine.model, engine.kv_slots, engine.step_tokens, engine.max_context) == ("model", 3, 64, 77)
    assert (engine.threads, engine.dtype, engine.device, engine.trust_remote_code) == (1, "float32", "cpu", False)
    assert engine.quantization == "nf4"
    assert config.limits.max_upload_bytes == 4096


def test_rewards_declare_how_they_read_and_critics_are_made_or_loaded(run, tmp_path):
    code, output, (config,) = run(
        "model", "--port", "0", "--reward", f"r1={tmp_path}/r", "--reward", f"r2={tmp_path}/s",
        "--reward-append-eos", "r1=no", "--reward-pooling", "r1=last_not_pad", "--reward-append-eos", "r2=yes",
        "--critic", "c1", "--critic", f"c2={tmp_path}/r",
    )  # fmt: skip
    assert code == 0, output
    assert [(one.append_eos, one.pooling) for one in config.rewards] == [(False, Pooling.LAST_NOT_PAD), (True, None)]
    assert [(one.name, one.path) for one in config.critics] == [("c1", None), ("c2", tmp_path / "r")]
    assert "reward r1: rank 16, score head of 1, no eos, read at last_not_pad, 1001 B" in output
    assert "reward r2: rank 16, score head of 1, eos, 1002 B" in output
    assert "critic c1: rank 16, value head, 1003 B, fresh" in output


def test_defaults_are_the_settings_own(run, tmp_path):
    from onebase.server.config import EngineConfig, ServerConfig

    _, _, (config,) = run("model", "--port", "0")
    assert config == ServerConfig(engine=EngineConfig(model="model"), port=0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--reward", "r1"], "--reward is 'r1': give its directory too, as NAME=PATH"),
        (["--policy", "p1="], "--policy is 'p1=': give a directory after the '='"),
        (["--policy", "p 1"], "adapter is 'p 1'"),
        (["--policy", "p1", "--policy", "p1"], "adapter is 'p1': give each adapter a name of its own"),
        (["--critic", "c1", "--policy", "c1"], "adapter is 'c1': give each adapter a name of its own"),
        (["--reward", "r=x", "--reward-append-eos", "r=maybe"], "is 'r=maybe': give NAME=CHOICE, with one of yes, no"),
        (["--reward", "r=x", "--reward-pooling", "r"], "--reward-pooling is 'r': give NAME=CHOICE, with one of last_"),
        (["--reward-append-eos", "q=yes"], "--reward-append-eos is 'q=yes': no --reward has this name"),
        (
            ["--reward", "r=x", "--reward-append-eos", "r=no", "--reward-append-eos", "r=no"],
            "--reward-append-eos is 'r=no': 'r' was given before; say it once",
        ),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--quantization", "int4"], "quantization is 'int4': use one of none, int8, nf4"),
        (["--root", __file__], "--root is"),
        (["--state", "s", "--evict-idle-seconds", "-1"], "--evict-idle-seconds is -1.0: use 0 or more"),
        (["--tokens", "/"], "--tokens is '/': it is a directory: give a file in it"),
        (
            ["--policy", "p1", "--policy", "p2", "--tenant-quota", "adapters=1"],
            "--tenant-quota is 'adapters=1': 2 adapters are to be there from the start, which count too",
        ),
        (
            ["--quota", "adapters=1,adapter_bytes=8X"],
            "adapter_bytes=8X: '8X' is no size: give a whole number, which may end in K, M or G, such as 8G",
        ),
        (["--quota", "adaptors=1"], "--quota is 'adaptors=1': 'adaptors' is no quota: use requests, completions"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_exit_code_1(run, arguments, told):
    code, output, seen = run("model", "--port", "0", *arguments)
    assert code == 1
    assert output.startswith("error ")
    assert told in output
    assert len(output.splitlines()) == 1
    assert seen == []


def test_sizes_are_written_like_those_of_quotas(run, tmp_path):
    code, output, (config,) = run(
        "model", "--port", "0", "--state", str(tmp_path / "s"), "--adapter-memory", "1G", "--kv-bytes", "2M",
        "--max-upload-bytes", "3K",
    )  # fmt: skip
    assert code == 0, output
    assert (config.state.adapter_memory, config.engine.kv_bytes, config.limits.max_upload_bytes) == (
        2**30,
        2**21,
        3 * 2**10,
    )
    code, output, _ = run("model", "--adapter-memory", "lots")
    assert code == 2
    assert "--adapter-memory" in output


def test_the_base_is_told_with_its_quantization(run, monkeypatch):
    facts = replace(FACTS, dtype="bfloat16", quantization="int8")
    monkeypatch.setattr(app, "open_parts", lambda config: Parts(FakeWorker(facts), FakeText()))
    _, output, _ = run("model", "--port", "0")
    assert "12,345 parameters in int8 with bfloat16 products (48.2 KiB) on cpu" in output


def test_a_base_that_does_not_open_is_one_line_and_exit_code_1(run, monkeypatch):
    def broken(config):
        raise FailedPrecondition("UNSUPPORTED_ARCHITECTURE", "T5 is no decoder: use a [causal] model")

    monkeypatch.setattr(app, "open_parts", broken)
    code, output, _ = run("model", "--port", "0")
    assert (code, output.strip().splitlines()[-1]) == (1, "error T5 is no decoder: use a [causal] model")


def test_help_is_quick_to_come():
    script = (
        "import sys, onebase.server.commands\n"
        "heavy = {'torch', 'transformers', 'peft', 'grpc', 'numpy'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_edge_is_there_without_torch():
    script = (
        "import sys, onebase.server.app\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
