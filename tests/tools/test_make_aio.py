import subprocess
import sys

import pytest
from make_aio import AIO, BY_HAND, ROOT, make
from twins.change import prose
from twins.modules import Refused

TWINS = {name: (AIO / f"{name}.py").read_text(encoding="utf-8") for name in BY_HAND}
HEAD = """from __future__ import annotations

import os
import threading
import time

from onebase.client.codec import adapters
from onebase.client.transport import Stream, Transport, new_request_id


class Session:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._names: list[str] = []

    def ask(self, name: str) -> list[int]:
        return self._transport.run(adapters.get(name))

    def chunks(self) -> Stream[int]:
        return self._transport.stream(adapters.get("x"))

"""
USES = '    def new(self) -> object:\n        """Made up."""\n'


def twin(body, head=HEAD):
    """What becomes of a method with this body, and the whole module."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    text = make({"session": f"{head}{USES}{lines}"}, TWINS)["session"]
    assert compile(text, "session.py", "exec")
    made = text[text.index('"""Made up."""\n') + len('"""Made up."""\n') :]
    return "\n".join(line.removeprefix("        ") for line in made.splitlines()), text


def test_what_is_committed_is_what_the_sync_modules_say():
    checked = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_aio.py", "--check"], capture_output=True, text=True
    )

    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("sync", "expected"),
    [
        ("return self.ask('a')", 'return await self.ask("a")'),
        ("return self.ask('a')[0]", 'return (await self.ask("a"))[0]'),
        ("return self.ask('a').count(2)", 'return (await self.ask("a")).count(2)'),
        ("return [self.ask(n) for n in self._names]", "return [await self.ask(n) for n in self._names]"),
        ("return adapters.ask(os.fspath('é'))", 'return adapters.ask(os.fspath("é"))'),
        ("return 'é', self.ask('a')", 'return "é", await self.ask("a")'),
        ("with self.chunks() as found:\n    return list(found)",
         "async with self.chunks() as found:\n    return [item async for item in found]"),
        ("found = self.chunks()\nfor item in found:\n    print(item)",
         "found = self.chunks()\nasync for item in found:\n    print(item)"),
        ("return {item for item in self.chunks()}", "return {item async for item in self.chunks()}"),
        ("return list(self._names)", "return list(self._names)"),
        ("with open('x') as file:\n    return self.ask(file.name)  # why",
         'with open("x") as file:\n    return await self.ask(file.name)  # why'),
        ("with self._lock:\n    self._names.append('x')\n\n    del self._names[0]",
         'self._names.append("x")\n\ndel self._names[0]'),
    ],
)  # fmt: skip
def test_a_body_becomes_its_twin(sync, expected):
    assert twin(sync)[0] == expected


def test_a_function_that_awaits_is_a_coroutine_and_one_that_does_not_is_not():
    _, text = twin("return self.ask('a')")

    assert "class AsyncSession:" in text
    assert "    async def ask(self, name: str) -> list[int]:" in text
    assert "    async def new(self) -> object:" in text
    assert "    def chunks(self) -> AsyncStream[int]:" in text
    assert "    def new(self) -> object:" in twin("return self._names")[1]


def test_imports_and_what_is_made_by_hand_are_the_twins_and_the_rest_is_shared():
    _, text = twin("time.monotonic()\nreturn new_request_id()")

    assert "from onebase.client.aio.transport import AsyncStream, Transport\n" in text
    assert "from onebase.client.transport import new_request_id\n" in text
    assert "threading" not in text
    assert "_lock" not in text


def test_what_gives_a_session_can_be_entered_without_an_await():
    text = make(
        {"session": HEAD, "client": CLIENT},
        TWINS,
    )["client"]

    assert "    @opens\n    async def open_session(self) -> AsyncSession:" in text
    assert "from onebase.client.aio.opening import opens\n" in text
    assert "async with self.open_session() as session:\n            return await session.ask" in text
    assert "session = await self.open_session()" in text


CLIENT = """from __future__ import annotations

from onebase.client.session import Session


class Client:
    def open_session(self) -> Session:
        self._transport.run(1)
        return Session(self._transport)

    def use(self) -> int:
        with self.open_session() as session:
            return session.ask("x")

    def keep(self) -> Session:
        session = self.open_session()
        return session
"""


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return lambda: self.ask('a')", "a function of its own"),
        ("return sum(len(self.ask(n)) for n in self._names)", "a function of its own"),
        ("return f\"{self.ask('a')}\"", "in a text"),
        ("with self._lock:\n    return self.ask('a')", "a lock"),
        ("time.sleep(1)", "time.sleep has no twin"),
        ("threading.Event()", "threading.Event has no twin"),
        ("self._transport.upload(1)", r"aio/transport.py has no Transport\.upload"),
        ("yield self.ask('a')", "a generator that awaits"),
        ("with self.chunks() as found, open('x'):\n    return list(found)", "nest them"),
    ],
)
def test_what_has_no_twin_is_refused_with_its_line(body, why):
    with pytest.raises(Refused, match=rf"session\.py:\d+: .*{why}"):
        twin(body)


def test_a_property_and_a_constructor_cannot_await():
    for definition in ("    @property\n    def facts(self):", "    def __init__(self):"):
        with pytest.raises(Refused, match=r"a property|cannot await"):
            make({"session": f"{HEAD}{definition}\n        return self.ask('a')\n"}, TWINS)


def test_a_name_is_a_coroutine_everywhere_or_nowhere():
    plain = "class Policy:\n    def ask(self):\n        return 1\n"
    with pytest.raises(Refused, match=r"policy\.py:2: ask awaits nothing here, but is a coroutine elsewhere"):
        make({"session": HEAD, "policy": plain}, TWINS)


def test_words_change_with_the_code():
    assert prose("`Session.ask`, a `with` block, any thread. Two threads.") == (
        "`AsyncSession.ask`, an `async with` block, any task. Two tasks."
    )
    assert prose("<Client of") == "<AsyncClient of"
    assert prose("Session, Policy and threading stay") == "Session, Policy and threading stay"
