"""Clients that vanish: killed, frozen, or without a word; and come back. Real processes, on both sides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracle.fixtures import FIXTURES
from restarts.conftest import Start
from restarts.plain import Plain, wait_until_durable
from support import RunningServer, environment, start_server

from onebase.client import connect
from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile

pytestmark = pytest.mark.e2e
NEVER = ("--checkpoint-seconds", "0")
"""Nothing is saved because time goes by."""

SCRIPT = """
import sys
import numpy as np
from onebase.client import AdamW, CrossEntropyLoss, LoraSpec, TrainingSequence, connect

address, label, token = sys.argv[1:]
row = TrainingSequence(prompt=np.array([5, 6]), completion=np.array([7, 8, 9]))
client = connect(address, token=token)
session = client.open_session(label=label, ttl=20)
session.create_adapter(label, LoraSpec(rank=4, target_modules=("all-linear",)))
session.set_active(label)
print(session.id, flush=True)
for line in sys.stdin:
    session.forward_backward(row, CrossEntropyLoss())
    if line == "step\\n":
        print(session.optim_step(AdamW(learning_rate=0.01)).adapter.version, flush=True)
    else:
        print("pass", flush=True)
"""


class Trainer:
    """A process with a session of its own and a policy that is called like it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.session = self._line()

    def step(self) -> int:
        """The version that it makes."""
        return int(self._tell("step"))

    def only_pass(self) -> None:
        """Leaves a pending gradient."""
        self._tell("pass")

    def _tell(self, what: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def trainer(address: str, label: str = "p", token: str = "") -> Iterator[Trainer]:
    """Starts one; it ends with the block, by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, address, label, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield Trainer(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@dataclass(frozen=True)
class Place:
    """A server that many tests share, and tokens of two tenants."""

    server: RunningServer
    state: Path
    red: str
    blue: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("vanishing")
    tokens, state = TokenFile(folder / "tokens.json"), folder / "state"
    red, blue = (tokens.add(tenant, tuple(Scope), (), None) for tenant in ("red", "blue"))
    flags = ("--state", str(state), "--threads", "1", "--tokens", str(folder / "tokens.json"), *NEVER)
    with start_server(FIXTURES / "base", *flags) as server:
        yield Place(server, state, red, blue)


def run(place: Place, script: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a program to its end; its arguments are an address and a token."""
    command = [sys.executable, "-c", script, place.server.address, place.red]
    return subprocess.run(command, env=environment(), capture_output=True, timeout=120)


def until(holds: Callable[[], object], seconds: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
    return time.monotonic() - began


def gone(server: RunningServer, label: str = "p") -> bool:
    return f"session {label!r}: its client is gone" in server.text()


def kill(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_client_is_noticed_at_once_and_its_step_is_durable(start: Start, state: Path) -> None:
    with start(*NEVER) as server, trainer(server.address) as first, Plain(server.address) as plain:
        assert first.step() == 1
        first.only_pass()
        trained = plain.weights()
        assert not gone(server)
        kill(first.process)
        assert until(lambda: gone(server), 3) < 3
        wait_until_durable(state, 1)  # nobody has called since
        with connect(server.address) as client, client.open_session(resume=first.session, ttl=20) as back:
            assert (back.id, back.ppo_adapter_name, back.refresh().leases) == (first.session, "p", ("p",))
            assert client.adapter("p").pending_gradients == 1  # all is where it was left
            kill(server.process)
    with start(*NEVER), Plain(server.address) as plain:
        assert plain.weights() == trained


def test_a_frozen_client_is_noticed_within_seconds_and_goes_on_when_it_thaws(place: Place) -> None:
    """Fault 6, of a client that holds a lease."""
    with trainer(place.server.address, "frozen", place.red) as frozen:
        assert [frozen.step() for _ in range(3)] == [1, 2, 3]
        frozen.only_pass()
        os.kill(frozen.process.pid, signal.SIGSTOP)
        try:
            assert until(lambda: gone(place.server, "frozen"), 10) < 10
            wait_until_durable(place.state, 3)
            with connect(place.server.address, token=place.red) as other:
                assert other.adapter("frozen").leased
        finally:
            os.kill(frozen.process.pid, signal.SIGCONT)
        assert frozen.step() == 4
        time.sleep(1)
        kill(frozen.process)  # it attends its session again, so it is missed again
        until(lambda: place.server.text().count("session 'frozen': its client is gone") == 2, 3)


def test_a_client_that_does_not_come_back_loses_its_lease_after_its_ttl(place: Place) -> None:
    with connect(place.server.address, token=place.red) as client:
        client.create_adapter("left")
        done = run(
            place,
            "import os, sys, time\nfrom onebase.client import connect\n"
            "session = connect(sys.argv[1], token=sys.argv[2]).open_session('left', label='left', ttl=2)\n"
            "time.sleep(3)\nprint(session.refresh().leases, flush=True)\nos.kill(os.getpid(), 9)\n",
        )
        assert done.stdout == b"('left',)\n", done.stderr.decode()  # it outlived its ttl while it was there
        until(lambda: gone(place.server, "left"), 3)
        assert client.adapter("left").leased
        until(lambda: not client.adapter("left").leased, 5)


def test_another_tenants_client_is_not_touched(place: Place) -> None:
    address = place.server.address
    with trainer(address, "reds", place.red) as lost, trainer(address, "blues", place.blue) as kept:
        assert (lost.step(), kept.step()) == (1, 1)
        kill(lost.process)
        until(lambda: gone(place.server, "reds"), 3)
        assert kept.step() == 2
        assert not gone(place.server, "blues")
        with connect(address, token=place.blue) as other, other.open_session(resume=lost.session) as theirs:
            assert theirs.id != lost.session


def test_an_attended_session_lives_through_a_kill_of_its_server_and_does_not_hold_a_stop_back(start: Start) -> None:
    with start("--durability", "step") as server, trainer(server.address) as client:
        assert client.step() == 1
        kill(server.process)
        with start("--durability", "step") as again:
            assert client.step() == 2
            time.sleep(3)  # so long may it take until the session is attended again
            began = time.monotonic()
            again.process.send_signal(signal.SIGTERM)
            assert again.process.wait(60) == 0
            assert time.monotonic() - began < 15
            assert not gone(again)


EXITS = {
    "forgets": "",
    "raises": "raise SystemExit(3)\n",
    "forks": "child = os.fork()\nif child == 0: os._exit(0)\nos.waitpid(child, 0)\n",
    "forks, and the child ends as programs do": "child = os.fork()\nif child: os.waitpid(child, 0)\n",
}


@pytest.mark.parametrize("how", EXITS)
def test_a_program_that_never_closes_its_session_ends_at_once(place: Place, how: str) -> None:
    done = run(
        place,
        "import os, sys, time\nfrom onebase.client import connect\n"
        f"session = connect(sys.argv[1], token=sys.argv[2]).open_session(label={how!r})\n"
        f"time.sleep(0.5)\n{EXITS[how]}",
    )
    assert done.returncode == (3 if how == "raises" else 0), done.stderr.decode()
    until(lambda: gone(place.server, how), 3)


def test_an_event_loop_that_is_held_up_does_not_lose_its_session(place: Place) -> None:
    done = run(
        place,
        "import asyncio, sys, time\nfrom onebase.client import connect_async\n"
        "async def main():\n"
        "    async with connect_async(sys.argv[1], token=sys.argv[2]) as client:\n"
        "        async with client.open_session(label='held', ttl=1) as session:\n"
        "            await asyncio.sleep(0.5)\n"
        "            time.sleep(12)\n"
        "            await session.refresh()\n"
        "asyncio.run(main())\n",
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not gone(place.server, "held")
