"""Clients that vanish: killed, frozen, or without a word; and come back. Real processes, on both sides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from restarts.conftest import Start
from restarts.test_restart import Plain, wait_until_durable
from support import RunningServer, environment

from onebase.client import connect
from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile
from onebase.v1 import adapters_pb2

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
    with start(*NEVER) as server, Plain(server.address) as plain:
        assert (plain.version(), plain.weights()) == (1, trained)


def test_a_frozen_client_is_noticed_within_seconds_and_goes_on_when_it_thaws(start: Start, state: Path) -> None:
    """Fault 6, of a client that holds a lease."""
    with start(*NEVER) as server, trainer(server.address) as frozen, Plain(server.address) as plain:
        assert frozen.step() == 1
        frozen.only_pass()
        os.kill(frozen.process.pid, signal.SIGSTOP)
        try:
            assert until(lambda: gone(server), 10) < 10
            wait_until_durable(state, 1)
            assert plain.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p")).leased
        finally:
            os.kill(frozen.process.pid, signal.SIGCONT)
        assert frozen.step() == 2
        time.sleep(1)
        kill(frozen.process)  # it attends its session again, so it is missed again
        until(lambda: server.text().count("its client is gone") == 2, 3)


def test_a_client_that_does_not_come_back_loses_its_lease_after_its_ttl(start: Start) -> None:
    with start() as server, connect(server.address) as client:
        client.create_adapter("p")
        script = (
            "import os, sys, time\nfrom onebase.client import connect\n"
            "session = connect(sys.argv[1]).open_session('p', label='p', ttl=2)\n"
            "time.sleep(3)\nprint(session.refresh().leases, flush=True)\nos.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, server.address], capture_output=True, env=environment())
        assert done.stdout == b"('p',)\n", done.stderr.decode()  # it outlived its ttl while it was there
        until(lambda: gone(server), 3)
        assert client.adapter("p").leased
        assert until(lambda: not client.adapter("p").leased, 5) > 0.5


def test_another_tenants_client_is_not_touched(start: Start, tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    red, blue = (tokens.add(tenant, tuple(Scope), (), None) for tenant in ("red", "blue"))
    with (
        start(*NEVER, "--tokens", str(tmp_path / "tokens.json")) as server,
        trainer(server.address, "reds", red) as lost,
        trainer(server.address, "blues", blue) as kept,
    ):
        assert (lost.step(), kept.step()) == (1, 1)
        kill(lost.process)
        until(lambda: gone(server, "reds"), 3)
        assert kept.step() == 2
        assert not gone(server, "blues")
        with connect(server.address, token=blue) as other, other.open_session(resume=lost.session) as theirs:
            assert theirs.id != lost.session


def test_an_attended_session_lives_through_a_kill_and_a_stop_of_its_server(start: Start) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(start("--durability", "step"))
        client = stack.enter_context(trainer(server.address))
        assert client.step() == 1
        for how, version in ((signal.SIGKILL, 2), (signal.SIGTERM, 3)):
            began = time.monotonic()
            server.process.send_signal(how)
            assert server.process.wait(60) == (0 if how == signal.SIGTERM else -how)
            assert time.monotonic() - began < 15  # the stream does not hold the stop back
            server = stack.enter_context(start("--durability", "step"))
            assert client.step() == version
        time.sleep(3)  # so long may it take to be attended again
        kill(client.process)
        until(lambda: gone(server), 3)


EXITS = {
    "forgets": "",
    "raises": "raise SystemExit(3)\n",
    "forks": "import os\nchild = os.fork()\nif child == 0: os._exit(0)\nos.waitpid(child, 0)\n",
    "forks and both end": "import os\nchild = os.fork()\nif child == 0: sys.exit(0)\nos.waitpid(child, 0)\n",
}


@pytest.mark.parametrize("how", EXITS)
def test_a_program_that_never_closes_its_session_ends_at_once(start: Start, how: str) -> None:
    script = (
        "import sys, time\nfrom onebase.client import connect\n"
        "session = connect(sys.argv[1]).open_session(label='p')\ntime.sleep(0.5)\n" + EXITS[how]
    )
    with start() as server:
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, server.address], env=environment(), timeout=60)
        assert time.monotonic() - began < 20
        assert done.returncode == (3 if how == "raises" else 0)
        until(lambda: gone(server), 3)


def test_an_event_loop_that_is_held_up_does_not_lose_its_session(start: Start) -> None:
    script = (
        "import asyncio, sys, time\nfrom onebase.client import connect_async\n"
        "async def main():\n"
        "    async with connect_async(sys.argv[1]) as client, client.open_session(label='p', ttl=1) as session:\n"
        "        await asyncio.sleep(0.5)\n"
        "        time.sleep(12)\n"
        "        await session.refresh()\n"
        "asyncio.run(main())\n"
    )
    with start() as server:
        done = subprocess.run([sys.executable, "-c", script, server.address], env=environment(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert not gone(server)
