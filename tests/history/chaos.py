"""The server that is killed again and again, and the clients that are killed beside it: one plan per seed.

Reproduced by the seed are the operations that each life of each client draws, and the order, kinds and delays of what
is done to the server. Not reproduced is the timing: which operation is under way when a kill strikes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forks import Forked, ForkServer
from history import journal
from history.client import TENANTS, Orders
from oracle.fixtures import FIXTURES

from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile

CLIENTS = 8
PLACES = ("before_rename", "after_rename", "after_commit")
START_SECONDS = 60.0


@dataclass(frozen=True)
class Fate:
    """What becomes of one life of the server."""

    kind: str
    """kill, starting, sigterm, or a failpoint's place."""
    delay: float
    """Seconds until then; of a failpoint, the longest wait."""
    count: int = 1
    """The so-manieth time that a failpoint's place is reached."""
    frozen: float = 0.0
    """Seconds for which it is stopped, before that."""
    client: int = -1
    """A client that is killed meanwhile."""
    hurry: float = 0.0
    """Seconds after SIGTERM until it is killed all the same; 0: it may finish."""
    flags: tuple[str, ...] = ()


def plan(seed: int, lively: float = 1.0) -> Callable[[], Fate]:
    """Draws one fate after the other; `lively` scales how long lives are."""
    dice = random.Random(f"{seed}/chaos")

    def draw() -> Fate:
        kind = dice.choices(("kill", "starting", "sigterm", *PLACES), (46, 6, 10, 12, 12, 14))[0]
        delay = {"starting": dice.uniform(0.02, 0.6), "sigterm": dice.uniform(0.3, 2.0)}.get(
            kind, dice.uniform(0.15, 2.6) if kind == "kill" else 5.0
        )
        return Fate(
            kind,
            delay * (lively if kind != "starting" else 1.0),
            dice.choice((1, 2, 3, 5, 8, 13)),
            dice.uniform(0.2, 1.0) if dice.random() < 0.08 else 0.0,
            dice.randrange(CLIENTS) if dice.random() < 0.25 else -1,
            dice.uniform(0.0, 0.4) if dice.random() < 0.5 else 0.0,
            (
                *(("--keep-checkpoints", "1") if dice.random() < 0.2 else ()),
                *(("--evict-idle-seconds", "0.5") if dice.random() < 0.3 else ()),
            ),
        )

    return draw


@dataclass
class Chaos:
    """A run under way.

    Args:
        forks: starts servers and clients.
        folder: of the run: the state, the roots, the journals.
        seed: of the plan.
        flags: for every server, besides what all need.
    """

    forks: ForkServer
    folder: Path
    seed: int
    flags: tuple[str, ...] = ()
    pace: float = 0.05
    ends: Counter[str] = field(default_factory=Counter)
    """How the server ended, how many times."""
    starts: list[float] = field(default_factory=list)
    """Seconds from each start to its first answer."""

    def __post_init__(self) -> None:
        for name in ("blobs", "root"):
            (self.folder / name).mkdir(parents=True)
        tokens = TokenFile(self.folder / "tokens.json")
        self.tokens = {tenant: tokens.add(tenant, tuple(Scope), (), None) for tenant in TENANTS}
        self._writer = journal.Writer(self.folder / "server.jsonl")
        self._writer.write(clock=time.time() - time.monotonic())
        self._lives = [0] * CLIENTS
        self._clients: list[Forked | None] = [None] * CLIENTS
        self.epoch = -1

    @property
    def kills(self) -> int:
        """How many times the server ended by SIGKILL."""
        return sum(count for how, count in self.ends.items() if how != "sigterm")

    def run(self, kills: int, told: Callable[[Chaos], None] = lambda _: None, lively: float = 1.0) -> None:
        """Kills the server so many times while clients do what they do, or until there is a file `enough`."""
        draw = plan(self.seed, lively)
        for number in range(CLIENTS):
            self._begin_client(number)
        while self.kills < kills and not (self.folder / "enough").exists():
            self._live(draw())
            told(self)
        with self.serving():
            time.sleep(1.0)
            (self.folder / "stop").touch()
            for client in self._clients:
                if client is not None:
                    client.wait(60)

    # ----------------------------------------------------------------------------------------------------- the server

    def argv(self, number: int, *flags: str) -> list[str]:
        """The command line of a server of this run."""
        port = self.folder / f"port-{number}"
        return [
            "onebase", "serve", str(FIXTURES / "base"), "--port", "0", "--port-file", str(port), "--threads", "1",
            "--state", str(self.folder / "state"), "--durability", "step", "--tokens",
            str(self.folder / "tokens.json"), "--root", str(self.folder / "root"), "--kv-slots", "8",
            "--reward", f"reward={FIXTURES / 'reward'}", "--drain-seconds", "2", *self.flags, *flags,
        ]  # fmt: skip

    def serving(self) -> _Serving:
        """One more life of the server, for the time of a block; it is killed at its end."""
        return _Serving(self)

    def _start(self, failpoints: str = "", flags: tuple[str, ...] = ()) -> tuple[Forked, float]:
        self.epoch += 1
        began = time.monotonic()
        env = {"ONEBASE_FAILPOINTS": failpoints}
        return self.forks.start(self.argv(self.epoch, *flags), self.folder / "server.log", **env), began

    def _until_serving(self, server: Forked, began: float) -> bool:
        """Waits for its port and tells the clients; False if it ended before."""
        port = self.folder / f"port-{self.epoch}"
        while not (port.exists() and port.read_text().strip()):
            if server.poll() is not None:
                return False
            if time.monotonic() - began > START_SECONDS:
                raise RuntimeError(f"the server does not serve; see {self.folder / 'server.log'}")
            time.sleep(0.02)
        self.starts.append(time.monotonic() - began)
        address, part = self.folder / "address", self.folder / "address.part"
        part.write_text(json.dumps({"epoch": self.epoch, "address": f"127.0.0.1:{port.read_text().strip()}"}))
        part.rename(address)
        return True

    def _ended(self, began: float, how: str) -> None:
        epoch = journal.Epoch(self.epoch, began, time.monotonic(), how)
        self._writer.write(**asdict(epoch))
        self.ends[how] += 1

    def _live(self, fate: Fate) -> None:
        """One life."""
        place = f"{fate.kind}:kill@{fate.count}" if fate.kind in PLACES else ""
        server, began = self._start(place, fate.flags)
        how = fate.kind
        if fate.kind == "starting":
            time.sleep(fate.delay)
            server.kill()
        elif self._until_serving(server, began):
            if fate.client >= 0:
                self._kill_client(fate.client)
            if fate.frozen:
                server.send_signal(signal.SIGSTOP)
                time.sleep(fate.frozen)
                server.send_signal(signal.SIGCONT)
            how = self._end(server, fate)
        status = server.wait(60)
        if status not in (-signal.SIGKILL, 0) or (status == 0 and fate.kind != "sigterm"):
            raise RuntimeError(f"the server ended with {status}; see {self.folder / 'server.log'}")
        self._ended(began, "sigterm" if status == 0 else how)
        if fate.client >= 0 and self._clients[fate.client] is None:
            self._begin_client(fate.client)

    def _end(self, server: Forked, fate: Fate) -> str:
        """Ends it as it shall end; returns how."""
        try:
            server.wait(fate.delay)
        except subprocess.TimeoutExpired:
            if fate.kind == "sigterm":
                server.send_signal(signal.SIGTERM)
                try:
                    server.wait(fate.hurry or 60)
                except subprocess.TimeoutExpired:
                    server.kill()
                return "while stopping"
            server.kill()
            return "kill"
        return fate.kind

    # ---------------------------------------------------------------------------------------------------- the clients

    def _begin_client(self, number: int) -> None:
        token = self.tokens[TENANTS[number % len(TENANTS)]]
        orders = Orders(str(self.folder), self.seed, number, self._lives[number], token, self.pace)
        self._lives[number] += 1
        out = self.folder / f"client-{number}.log"
        self._clients[number] = self.forks.start(orders.argv(), out, "history.client:main")

    def _kill_client(self, number: int) -> None:
        client = self._clients[number]
        if client is not None:
            client.kill()
            client.wait(10)
            self._clients[number] = None


class _Serving:
    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos

    def __enter__(self) -> str:
        self._server, self._began = self._chaos._start()
        if not self._chaos._until_serving(self._server, self._began):
            raise RuntimeError(f"the server does not start: see {self._chaos.folder / 'server.log'}")
        there: str = json.loads((self._chaos.folder / "address").read_text())["address"]
        return there

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait(10)
        self._chaos._ended(self._began, "kill")


def tell(chaos: Chaos) -> str:
    """How far a run is, in a line."""
    starts = sorted(chaos.starts) or [0.0]
    ends = ", ".join(f"{how} {count}" for how, count in sorted(chaos.ends.items()))
    return f"{chaos.kills} kills ({ends}); a start takes {starts[len(starts) // 2]:.2f} s; pid {os.getpid()}"
