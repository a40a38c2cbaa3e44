"""What users see of the package, and what importing it costs them."""

import inspect
import json
import pydoc
import re
import subprocess
import sys
import textwrap
import time

import numpy as np
import public_api
import pytest
from public_api import changes

import onebase.client as onebase
from onebase.client import aio

READING = ("generate", "stream", "logprob", "reference_logprob", "reward", "score")


def test_the_surface_is_the_one_that_is_listed():
    assert not changes(), "\n".join(
        ["the public API has changed; if that is meant, run 'make api' and commit the list:", *changes()]
    )


def test_what_changes_is_shown(monkeypatch, tmp_path):
    there = public_api.public_api()
    listed = tmp_path / "list.txt"
    listed.write_text(
        there.replace("Session.close(self)", "Session.close(self, wait: float)").replace("BASE", "BOTTOM")
    )
    monkeypatch.setattr(public_api, "LIST", listed)

    assert "-def onebase.client.Session.close(self, wait: float) -> None" in changes()
    assert "+def onebase.client.Session.close(self) -> None" in changes()
    assert {"-onebase.client.BOTTOM = 'base'", "+onebase.client.BASE = 'base'"} <= set(changes())


def is_told(name, value):
    """Whether a symbol has a docstring of its own; a dataclass makes one up, of its parameters, for want of it."""
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{name.rpartition('.')[2]}(")


def test_everything_public_is_documented():
    documented = {
        name: value
        for name, value in public_api.symbols().items()
        if (inspect.isclass(value) or inspect.isfunction(value) or isinstance(value, property))
        and not name.endswith("__")
    }
    assert len(documented) > 100
    assert not [name for name, value in documented.items() if not is_told(name, value)]


def test_help_teaches_both_clients_and_names_everything_that_a_program_begins_with():
    text = pydoc.render_doc(onebase, renderer=pydoc.plaintext)
    for shown in (
        "with onebase.connect(",
        "async with onebase.connect_async(",
        "session.generate(",
        "await session.generate(",
        "session.score(",
        "session.forward_backward(",
        "session.optim_step(",
        "async for chunk in session.stream(",
    ):
        assert shown in text, shown
    shown = pydoc.render_doc(onebase.AsyncClient.open_session, renderer=pydoc.plaintext)
    assert "'Opening[AsyncSession]'" in shown
    assert "seconds that the session outlives a client" in shown


def examples():
    """The programs in the packages' docstrings."""
    for module in (onebase, aio):
        for block in re.findall(r"(?:^    .*\n|^\n)+", module.__doc__, re.MULTILINE):
            if block.strip():
                yield textwrap.dedent(block)


@pytest.mark.parametrize("example", list(examples()))
def test_examples_run(server, example, capsys):
    program = example.replace("127.0.0.1:7070", server.target)
    if "async" in program and "asyncio.run" not in program:
        program = f"import asyncio\nasync def main():\n{textwrap.indent(program, '    ')}\nasyncio.run(main())"
    with onebase.connect(server.target) as client, client.open_session("policy_1") as session:
        (completion,) = session.generate("The film was")
        arrays = {
            name: np.zeros(len(completion.tokens), np.float32)
            for name in ("old_logprobs", "old_values", "advantages", "returns")
        }
        exec(program, {"onebase": onebase, "session": session, "c": completion, **arrays})

    assert capsys.readouterr().out or server.requests["OptimStep"]


@pytest.mark.parametrize("name", READING)
def test_every_call_takes_a_timeout(name):
    for kind in (onebase.Client, onebase.Session, onebase.AsyncClient, onebase.AsyncSession):
        if hasattr(kind, name):
            assert inspect.signature(getattr(kind, name)).parameters["timeout"].default is None


def test_the_defaults_are_those_of_the_contract():
    assert inspect.signature(onebase.connect).parameters["target"].default == "127.0.0.1:7070"
    assert inspect.signature(onebase.Client.generate).parameters["adapter"].default is inspect.Parameter.empty
    assert inspect.signature(onebase.Session.generate).parameters["adapter"].default == ""
    assert inspect.signature(onebase.Session.forward_backward).parameters["loss"].default == onebase.PpoLoss()


def test_no_protobuf_is_in_the_surface():
    for name in onebase.__all__:
        value = getattr(onebase, name)
        if inspect.isclass(value):
            assert not any(base.__module__.startswith("google.protobuf") for base in value.__mro__)


def test_importing_is_light_and_quick():
    program = (
        "import json, sys, time\n"
        "begin = time.process_time()\n"
        "import onebase.client\n"
        "print(json.dumps([time.process_time() - begin, sorted(sys.modules)]))"
    )
    best, loaded = 10.0, []
    for _ in range(3):  # CPU seconds, the best of three: what others do on the machine does not count
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        seconds, loaded = json.loads(out)
        best = min(best, seconds)

    heavy = {"torch", "transformers", "peft", "datasets", "pandas", "rich", "typer", "click", "yaml"}
    assert not heavy & {module.split(".")[0] for module in loaded}
    assert not [module for module in loaded if module.startswith(("onebase.server", "onebase.trainer"))]
    assert best < 1.0


def test_a_process_that_forgets_to_close_ends_at_once_and_in_silence(server):
    program = (
        "import sys, onebase.client as onebase\n"
        "client = onebase.connect(sys.argv[1])\n"
        "session = client.open_session('policy_1')\n"
        "stream = client.stream('ab', adapter='base')\n"
        "print(next(stream).text)\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, server.target], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "a\n", "")
    assert time.monotonic() - begin < 30
