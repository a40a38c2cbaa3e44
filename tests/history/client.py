"""One of the clients: random operations until it is told to stop, killed, or both.

A process of its own, forked (`forks`), which keeps nothing but its journal: one that was killed and begins again reads
there which session it had and what it does not know the outcome of, and asks for that by request_id.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from history import journal
from history.calls import READS, ROWS, Cancelled, Stubs, facts_of, keep_blob, refusal, request_of, send
from history.journal import DURABLE, OK, Op

TENANTS = ("red", "blue")
SHARED = ("p0",)
"""Names that several clients of both tenants fight for."""
TIMEOUT = 15.0
PATIENCE = 40.0
"""Seconds that a client waits for the server to come back."""
LOSSES = ("cross_entropy", "cross_entropy", "importance_sampling", "value")


@dataclass(frozen=True)
class Orders:
    """What a client is told when it begins."""

    folder: str
    seed: int
    number: int
    life: int
    token: str
    pace: float
    """Seconds between operations, on average."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return TENANTS[self.number % len(TENANTS)]

    def argv(self) -> list[str]:
        """As a command line."""
        return ["history-client", json.dumps(asdict(self))]


class Stopped(Exception):
    """The run is over."""


class Client:
    """Random operations, each written down before and after."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.folder = Path(orders.folder)
        self.random = random.Random(f"{orders.seed}/{orders.number}/{orders.life}")
        path = self.folder / f"client-{orders.number}.jsonl"
        before = journal.read(path)
        self.writer = journal.Writer(path)
        self.count = 0
        self.epoch = -1
        self.stubs: Stubs | None = None
        self.session = ""
        self.pending: dict[str, int] = {}
        self.versions: dict[str, int] = {}
        self.mine: set[str] = set()
        self.saved: list[str] = []
        self.blobs: list[tuple[str, list[Any]]] = []
        own = f"q{orders.number // (2 * len(TENANTS))}"  # equal in both tenants
        self.names = (own, own, *SHARED)
        self._take_up(before)

    def _take_up(self, before: list[Op]) -> None:
        """Goes on where a life that was killed has ended."""
        self.resumed = ""
        for op in before:
            if op.kind == "open" and op.ok is not None:
                self.resumed = str(op.ok.answer["session"])
        # Without a request_id a repeated call may do it all again, and the model counts an operation once.
        self.unresolved = [op for op in before if op.unknown and op.kind in DURABLE and op.request_id][-3:]

    # ------------------------------------------------------------------------------------------------ sending

    def _connected(self) -> Stubs:
        """The server as it is now; waits for one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if (self.folder / "stop").exists():
                raise Stopped
            try:
                there = json.loads((self.folder / "address").read_text())
            except (OSError, json.JSONDecodeError):
                there = {"epoch": -1}
            if there["epoch"] > self.epoch or (self.stubs is not None and there["epoch"] == self.epoch):
                return self._at(there["epoch"], there["address"])
            time.sleep(0.08)
        raise Stopped

    def _at(self, epoch: int, address: str) -> Stubs:
        if epoch != self.epoch or self.stubs is None:
            if self.stubs is not None:
                self.stubs.channel.close()
            self.epoch, self.stubs = epoch, Stubs(address, self.orders.token)
            self.pending.clear()
        return self.stubs

    def new(self, kind: str, *, named: bool = True, **args: Any) -> Op:
        """An operation, not sent yet; `named` gives it a request_id where it can have one."""
        self.count += 1
        known = f"{self.orders.number}.{self.orders.life}.{self.count}"
        may = kind in DURABLE or kind in ("pass", "save")
        request_id = known if may and named else ""
        return Op(known, kind, self.orders.number, self.orders.tenant, self.session, request_id, args)

    def attempt(self, op: Op, timeout: float = TIMEOUT, cancel: float | None = None) -> bool:
        """Sends it once; whether it was answered with a result."""
        stubs = self._connected()
        request, data = request_of(op.kind, op.args), b""
        if op.session and "session_id" in request.DESCRIPTOR.fields_by_name:
            request.session_id = op.session
        if op.request_id:
            request.request_id = op.request_id
        if op.kind == "upload":
            data = (self.folder / "blobs" / op.args["blob"]).read_bytes()
        self.writer.begin(op, self.epoch, time.monotonic())
        try:
            messages = send(stubs, op.kind, request, timeout, cancel, data)
        except Cancelled:
            self.writer.end(op, time.monotonic(), "CANCELLED")
            return False
        except grpc.RpcError as error:
            now = time.monotonic()
            code, reason = refusal(error)
            self.writer.end(op, now, code, reason)
            if code == "UNAVAILABLE" and reason != "LOADING":
                stubs.channel.close()
                self.stubs = None  # wait for the next server
            return False
        now, facts = time.monotonic(), {}
        if op.kind == "download":
            facts["blob"] = keep_blob(self.folder / "blobs", messages)
        self.writer.end(op, now, OK, "", {**facts_of(op.kind, messages), **facts})
        return True

    def do(self, op: Op) -> bool:
        """Sends it until its outcome is known, mostly; at times twice, cut short, or given up."""
        dice = self.random.random()
        timeout, cancel = TIMEOUT, None
        if dice < 0.04:
            timeout = self.random.uniform(0.004, 0.08)
        elif dice < 0.08:
            cancel = self.random.uniform(0.001, 0.06)
        done = self.attempt(op, timeout, cancel)
        if op.request_id:
            while not done and op.attempts[-1].code in journal.AMBIGUOUS and self.random.random() < 0.88:
                done = self.attempt(op)
            if done and self.random.random() < 0.05:
                self.attempt(op)
            if done and self.random.random() < 0.02:
                self._reuse(op)
        last = op.attempts[-1]
        if last.reason == "SESSION_NOT_FOUND":
            self._forget_session()
        return done

    def _reuse(self, op: Op) -> None:
        """The same request_id with another payload, written down as a kind of its own: must be refused."""
        other = self.new("reuse", of=op.kind, epoch=op.attempts[-1].epoch)
        other.session, other.request_id = op.session, op.request_id
        request = request_of(op.kind, {**op.args, "name": "reused"})
        request.session_id, request.request_id = op.session, op.request_id
        data = (self.folder / "blobs" / op.args["blob"]).read_bytes() if op.kind == "upload" else b""
        stubs = self._connected()
        self.writer.begin(other, self.epoch, time.monotonic())
        try:
            send(stubs, op.kind, request, TIMEOUT, None, data)
            self.writer.end(other, time.monotonic(), OK)
        except grpc.RpcError as error:
            code, reason = refusal(error)
            self.writer.end(other, time.monotonic(), code, reason)

    # -------------------------------------------------------------------------------------------- what is done

    def run(self) -> None:
        """Until the run is over."""
        weighted = [
            (self._train, 30), (self._read, 26), (self._look, 16), (self._create, 7), (self._delete, 3),
            (self._save_and_load, 5), (self._carry, 4), (self._activate, 6), (self._foreign, 2), (self._close, 1),
        ]  # fmt: skip
        actions, weights = zip(*weighted, strict=True)
        for op in self.unresolved:
            if self.random.random() < 0.85:
                while not self.attempt(op) and op.attempts[-1].code in journal.AMBIGUOUS:
                    pass
        while True:
            if not self.session:
                self._open()
            else:
                self.random.choices(actions, weights)[0]()
            time.sleep(self.random.expovariate(1 / self.orders.pace))

    def _name(self) -> str:
        if self.mine and self.random.random() < 0.7:
            return self.random.choice(sorted(self.mine))
        return self.random.choice(self.names)

    def _forget_session(self) -> None:
        self.session, self.resumed = "", self.session
        self.mine.clear()
        self.pending.clear()

    def _open(self) -> None:
        ttl = 2.0 if self.random.random() < 0.15 else 600.0
        args: dict[str, Any] = {"ttl": ttl}
        if self.resumed and self.random.random() < 0.9:
            args["resume"] = self.resumed
        op = self.new("open", **args)
        if self.attempt(op):
            self.session = str(op.ok.answer["session"]) if op.ok else ""

    def _close(self) -> None:
        if self.attempt(self.new("close")):
            self._forget_session()
            self.resumed = ""

    def _train(self) -> None:
        name = self._name()
        for _ in range(self.random.randint(1, 3)):
            args: dict[str, Any] = {"name": name, "loss": self.random.choice(LOSSES)}
            args["rows"] = self.random.sample(range(len(ROWS)), self.random.randint(1, 3))
            op = self.new("pass", named=self.random.random() < 0.8, **args, **self._expected(name))
            if not self.do(op):
                if op.attempts[-1].code not in journal.AMBIGUOUS:
                    self.mine.discard(name)
                    return
            else:
                self._learned(op)
        if self.random.random() < 0.9:
            args = {"name": name, "rate": self.random.choice((0.001, 0.01)), **self._expected(name)}
            if self.random.random() < 0.3:
                args["clip"] = 0.5
            op = self.new("step", named=self.random.random() < 0.92, **args)
            if self.do(op) and op.ok is not None:
                self.versions[name], self.pending[name] = op.ok.answer["version"], 0
            else:
                self.pending.pop(name, None)
                self.versions.pop(name, None)

    def _learned(self, op: Op) -> None:
        assert op.ok is not None
        self.mine.add(op.name)
        self.pending[op.name], self.versions[op.name] = op.ok.answer["pending"], op.ok.answer["version"]

    def _expected(self, name: str) -> dict[str, int]:
        found = {}
        if name in self.pending and self.random.random() < 0.4:
            found["expected_pending"] = self.pending[name]
        if name in self.versions and self.random.random() < 0.3:
            found["expected_version"] = self.versions[name]
        return found

    def _read(self) -> None:
        kind = self.random.choice((*READS, "reward"))
        name = self._name()
        if kind == "reward":
            named = name if self.random.random() < 0.3 else ""
            args: dict[str, Any] = {"rows": [self.random.randrange(4)], "name": named}
        elif kind == "generate":
            args = {"name": name, "rows": [self.random.randrange(2)], "seed": self.random.randrange(2), "tokens": 6}
        else:
            args = {"name": name, "rows": [self.random.randrange(3), 5]}
        op = self.new(kind, **args)
        if self.random.random() < 0.3 and kind in ("logprob", "generate"):
            op.session = ""
        self.do(op)

    def _look(self) -> None:
        kind = self.random.choice(("get", "get", "list", "session", "download"))
        op = self.new(kind, **({"name": self._name()} if kind in ("get", "download") else {}))
        if self.do(op) and kind == "download" and op.ok is not None:
            self.blobs = [*self.blobs[-3:], (op.ok.answer["blob"], op.ok.answer["files"])]

    def _create(self) -> None:
        name = self.random.choice(self.names)
        args: dict[str, Any] = {"name": name, "seed": self.random.randrange(1000)}
        if self.random.random() < 0.35:
            args["init_from"] = self.random.choice(self.names)
        else:
            args["rank"] = self.random.choice((2, 4))
        if self.do(self.new("create", named=self.random.random() < 0.9, **args)):
            self.mine.add(name)

    def _delete(self) -> None:
        name = self._name()
        if self.do(self.new("delete", named=self.random.random() < 0.9, name=name)):
            self.mine.discard(name)
            self.pending.pop(name, None)
            self.versions.pop(name, None)

    def _save_and_load(self) -> None:
        if not self.saved or self.random.random() < 0.5:
            path = f"{self.orders.tenant}-{self.orders.number}-{self.orders.life}-{self.count}"
            op = self.new("save", name=self._name(), path=path)
            if self.do(op):
                self.saved = [*self.saved[-3:], path]
        if self.saved:
            self._put("load", path=self.random.choice(self.saved))

    def _carry(self) -> None:
        """Uploads what was downloaded."""
        if self.blobs:
            blob, files = self.random.choice(self.blobs)
            self._put("upload", blob=blob, files=files)

    def _put(self, kind: str, **args: Any) -> None:
        name = self._name()
        args |= {"name": name, "with_optimizer": self.random.random() < 0.6, "seed": self.random.randrange(1000)}
        if self.random.random() < 0.7:
            args["replace"] = True
        if self.do(self.new(kind, named=self.random.random() < 0.9, **args)):
            self.mine.add(name)
            self.pending.pop(name, None)
            self.versions.pop(name, None)

    def _activate(self) -> None:
        name = self.random.choice(self.names)
        if self.do(self.new("active", name=name)):
            self.mine.add(name)

    def _foreign(self) -> None:
        """Asks for what only the other tenant has: it is not there."""
        other = next(one for one in TENANTS if one != self.orders.tenant)
        if self.random.random() < 0.3:
            own = f"only_{self.orders.tenant}"
            self.do(self.new("create", name=own, seed=1, rank=2))
        self.do(self.new("get", name=f"only_{other}"))


def main() -> None:
    """The target of a fork."""
    os.nice(3)
    client = Client(Orders(**json.loads(sys.argv[1])))
    with contextlib.suppress(Stopped):
        client.run()
