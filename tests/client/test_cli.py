"""The `onebase` command: how it finds its subcommands, and what it says when something is wrong."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint, version
from types import SimpleNamespace

import grpc
import pytest
import typer
from client.wire import Failure

from onebase.client import cli, terminal


@pytest.fixture
def entries(monkeypatch):
    """Subcommands as if these packages were installed."""

    def install(name, module, function=None):
        if function is not None:
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(command=function))
        there[name] = EntryPoint(name, f"{module}:command", cli.GROUP)

    there = {}
    monkeypatch.setattr(cli, "_entries", lambda: there)
    return install


def test_help_teaches_and_lists_what_is_installed(run):
    shown = run("--help")

    assert shown.code == 0
    assert 'onebase reward "The film was"' in shown.out
    for name, sentence in {
        "adapters": "List the adapters",
        "generate": "Let a policy write",
        "reward": "Ask the reward model",
        "status": "Show what the server is doing",
    }.items():
        assert re.search(rf"{name} +{sentence}", shown.out), name


@pytest.mark.parametrize("name", ["adapters", "generate", "reward", "status"])
def test_every_command_shows_examples(run, name):
    shown = run(name, "--help")

    assert shown.code == 0
    assert "Examples" in shown.out
    assert f"onebase {name}" in shown.out


@pytest.mark.parametrize("reason", ["TOKEN_MISSING", "TOKEN_UNKNOWN", "TOKEN_EXPIRED"])
def test_who_needs_a_token_is_told_how_a_command_is_given_one(run, server, reason):
    server.fail("GetServerInfo", Failure(grpc.StatusCode.UNAUTHENTICATED, "who is it", reason=reason))
    shown = run("status")

    assert shown.code == 1
    assert shown.err == (
        f"error: who is it ({reason}); `onebase status` takes its token from ONEBASE_TOKEN, or --token\n"
    )


def test_the_log_of_grpcs_core_is_still_unless_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    program = "import os, sys; sys.argv[1:] = ['--version']; from onebase.__main__ import main\n"
    program += "try: main()\nfinally: print(os.environ['GRPC_VERBOSITY'])"
    for asked, said in ((None, "NONE"), ("ERROR", "ERROR")):
        if asked:
            monkeypatch.setenv("GRPC_VERBOSITY", asked)
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == said


def test_the_version_is_told(run):
    shown = run("--version")

    assert (shown.code, shown.out) == (0, f"onebase {version('onebase')}\n")


def test_wrong_usage_is_status_2(run):
    assert run("frobnicate").code == 2
    assert run("generate").code == 2
    assert run().code == 2


def test_a_function_and_an_app_can_be_commands(run, entries):
    app = typer.Typer()
    app.command()(lambda: typer.echo("an app"))
    entries("one", "some.package", lambda: typer.echo("a function"))
    entries("two", "other.package", app)

    assert run("one").out == "a function\n"
    assert run("two").out == "an app\n"


def test_a_command_without_its_packages_says_what_to_install(run, entries):
    entries("serve", "onebase.server.not_there")

    sentence = (
        "`onebase serve` needs the package onebase.server.not_there, which is not installed: "
        "pip install 'onebase[server]'"
    )
    assert "Not installed here: pip install 'onebase[server]'" in run("--help").out
    for args in (["serve"], ["serve", "model", "--port", "7"], ["serve", "--help"]):
        shown = run(*args)
        assert (shown.code, shown.out, shown.err) == (1, "", f"error: {sentence}\n")


def test_a_package_that_turns_out_to_be_missing_is_told_alike(run, entries):
    def serve():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    entries("serve", "onebase.server.lazy", serve)
    entries("other", "acme.commands", serve)

    assert "needs the package torch, which is not installed: pip install 'onebase[server]'" in run("serve").err
    assert run("--help").code == 0
    assert run("other").err == "error: `onebase other` needs the package torch, which is not installed\n"
    assert run("serve").code == 1


def test_a_missing_module_of_our_own_is_a_bug_and_not_hidden(run, entries):
    def serve():
        raise ModuleNotFoundError("No module named 'onebase.server.typo'", name="onebase.server.typo")

    entries("serve", "onebase.server.lazy", serve)

    assert isinstance(run("serve").raw.exception, ModuleNotFoundError)


def test_a_broken_command_troubles_no_other(run, entries):
    entries("broken", "not.there")
    entries("fine", "some.package", lambda: typer.echo("fine"))

    assert run("fine").out == "fine\n"


def test_what_the_server_refuses_is_one_line_with_reason_and_field(run, server):
    failure = Failure(grpc.StatusCode.INVALID_ARGUMENT, "it is\nempty", "EMPTY_COMPLETION", "sequences[0].completion")
    server.fail("Reward", failure)

    shown = run("reward", "p", "")

    assert (shown.code, shown.out) == (1, "")
    assert shown.err == "error: it is empty (EMPTY_COMPLETION, field sequences[0].completion)\n"


def test_an_error_without_reason_has_no_brackets(run, server):
    server.fail("GetStatus", Failure(grpc.StatusCode.INTERNAL, "bug 123"))

    assert run("status").err == "error: bug 123\n"


def test_an_interrupt_is_status_130(run, entries):
    def interrupted():
        raise KeyboardInterrupt

    entries("wait", "some.package", interrupted)

    assert run("wait").code == 130


def test_an_address_without_a_port_is_wrong_usage(run):
    shown = run("status", "--server", "localhost")

    assert shown.code == 2
    assert "has no port" in shown.err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB"), (2048 * 1024**4, "2048.0 TiB")],
)
def test_bytes_for_people(count, text):
    assert terminal.human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (14_881, "14.9k"), (7_240_000_000, "7.2B"), (350_000_000, "350.0M")]
)
def test_counts_for_people(count, text):
    assert terminal.human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3723, "1 h 2 min"), (100_000, "1 d 3 h")],
)
def test_seconds_for_people(seconds, text):
    assert terminal.human_seconds(seconds) == text
