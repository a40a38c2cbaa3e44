from __future__ import annotations

import json
import time

import pytest
from server.tenants import Guarded
from typer.testing import CliRunner

from onebase.client import cli, connect
from onebase.server import commands
from onebase.server.config import EngineConfig, Security, ServerConfig
from onebase.server.identity import Scope
from onebase.server.token_commands import token
from onebase.server.tokens import TokenFile


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBASE_TOKENS", str(tmp_path / "tokens.json"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        result = CliRunner().invoke(token, list(arguments))
        return result.exit_code, result.output.strip()

    return run


def test_a_token_is_made_listed_and_revoked(run, tmp_path):
    code, made = run(
        "create", "--tenant", "red", "--scope", "reward,generate", "--adapter", "policy_1", "--expires", "30d"
    )
    assert code == 0
    name, secret = made.split("_", 2)[1:]
    (kept,) = TokenFile(tmp_path / "tokens.json").read().values()
    assert (kept.id, kept.tenant, kept.scopes, kept.adapters) == (
        name,
        "red",
        ("reward", "generate"),
        ("policy_1",),
    )
    assert abs(kept.expires - time.time() - 30 * 86400) < 60
    code, listed = run("list")
    assert (code, name in listed, "reward, generate" in listed, secret in listed) == (0, True, True, False)
    record = json.loads(run("list", "--json")[1])
    assert (record["id"], record["hash"]) == (name, None)
    assert run("revoke", name) == (0, f"revoked {name}")
    assert TokenFile(tmp_path / "tokens.json").read() == {}
    code, told = run("revoke", name)
    assert (code, "there is no token" in told) == (1, True)


def test_all_is_every_scope_and_never_is_no_end(run, tmp_path):
    assert run("create", "--scope", "all")[0] == 0
    (kept,) = TokenFile(tmp_path / "tokens.json").read().values()
    assert (kept.tenant, set(kept.scopes), kept.adapters, kept.expires) == (
        "default",
        {one.value for one in Scope},
        (),
        None,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scope", "everything"], "'everything' is none of"),
        (["--scope", "all", "--expires", "30"], "'30' is no time"),
        (["--scope", "all", "--expires", "99999999d"], "is more than 10 years: give up to 3650d, or never"),
        (["--scope", "all", "--expires", "0d"], "'0d' is no time"),
        (["--scope", "all", "--tenant", "a/b"], "'a/b' is not a name"),
        (["--scope", "all", "--adapter", "../x"], "is not a name"),
        ([], "--scope"),
    ],
)
def test_wrong_usage_is_told_and_makes_nothing(run, tmp_path, arguments, told):
    code, output = run("create", *arguments)
    assert code == 2
    assert told in " ".join(output.replace("│", "").split())
    assert not (tmp_path / "tokens.json").exists()


def test_a_list_of_nothing_says_what_makes_it(run):
    code, told = run("list")
    assert (code, "`onebase token create` makes it" in told) == (1, True)


def test_what_is_no_token_file_is_told_without_pythons_words(run, tmp_path):
    for text in ("[]", "{}", "{", '{"tokens": 3}', '{"tokens": [[]]}'):
        (tmp_path / "tokens.json").write_text(text)
        code, told = run("list")
        assert code == 1
        assert "it is no token file; `onebase token create` makes one" in told
        assert "indices" not in told


def test_commands_send_their_token(tmp_path, monkeypatch):
    with Guarded(tmp_path) as guarded:
        address = f"127.0.0.1:{guarded.port}"
        good = guarded.make("red")
        with connect(address, token=good) as client:
            client.create_adapter("p1")

        def command(*arguments, **environment):
            return CliRunner().invoke(cli.app, [*arguments, "--server", address], env=environment)

        refused = command("status")
        assert refused.exit_code == 1
        assert "TOKEN_MISSING" in refused.output
        assert command("status", "--token", good).exit_code == 0
        assert command("status", ONEBASE_TOKEN=good).exit_code == 0
        assert command("status").exit_code == 1  # nothing is kept from the command before
        assert "p1" in command("adapters", ONEBASE_TOKEN=good).output
        gone = command("adapters", "delete", "p1", "--yes", "--token", good)
        assert (gone.exit_code, gone.output) == (0, "deleted p1\n")


def test_the_operator_is_warned_of_an_open_door():
    def config(host, **security):
        return ServerConfig(engine=EngineConfig(model="m"), host=host, security=Security(**security))

    assert commands._warnings(config("127.0.0.1")) == []
    plain, open_door = commands._warnings(config("0.0.0.0", insecure=True))
    assert "there is no TLS" in plain
    assert "whoever reaches this address may do everything" in open_door
