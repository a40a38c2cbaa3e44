"""What happened: every attempt of every operation, written down before it is sent and again when it is answered.

A line is one JSON object. A client that is killed leaves attempts without an end: nobody learned what became of them.
Times are seconds of the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

OK = "OK"
AMBIGUOUS = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL", ""})
"""Codes that say nothing of whether the call had its effect; "" is no answer at all."""

DURABLE = frozenset({"create", "load", "upload", "delete", "step"})
"""Operations whose answers outlive the server, by request_id."""

MAKING = frozenset({"create", "load", "upload"})

LAST_LOOK = 1000
"""Clients from this number on are no programs of the run: they look what is there when it is over (`audit`)."""


@dataclass
class Attempt:
    """An operation, sent once. `epoch` counts the server's starts."""

    epoch: int
    began: float
    ended: float | None = None
    code: str = ""
    reason: str = ""
    answer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Op:
    """An operation and its attempts, in order; they share its request_id, if it has one."""

    id: str
    kind: str
    client: int
    tenant: str
    session: str
    request_id: str
    args: dict[str, Any]
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The adapter that it names, "" for none."""
        return str(self.args.get("name", ""))

    @property
    def began(self) -> float:
        """When it was first sent."""
        return self.attempts[0].began

    @property
    def ok(self) -> Attempt | None:
        """The first attempt that was answered with a result."""
        return next((one for one in self.attempts if one.code == OK), None)

    @property
    def unknown(self) -> bool:
        """Whether it may have had its effect, and nobody learned it."""
        if self.ok is not None:
            return False
        last = self.attempts[-1]
        kept = self.kind in DURABLE and self.request_id
        if last.code not in AMBIGUOUS and last.reason != "SESSION_NOT_FOUND" and kept:
            return False  # had an earlier attempt had its effect, this one would have found its answer
        return any(one.code in AMBIGUOUS and one.reason not in ("LOADING", "DRAINING") for one in self.attempts)

    @property
    def possible(self) -> bool:
        """Whether it had its effect or may have had it."""
        return self.ok is not None or self.unknown


class Writer:
    """Appends to a journal; each line is in the file when the method returns.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **line: Any) -> None:
        """Appends a line."""
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def begin(self, op: Op, epoch: int, now: float) -> None:
        """An attempt is about to be sent."""
        facts = {key: value for key, value in vars(op).items() if key != "attempts"} if not op.attempts else {}
        op.attempts.append(Attempt(epoch, now))
        self.write(id=op.id, epoch=epoch, began=now, **({"op": facts} if facts else {}))

    def end(self, op: Op, now: float, code: str, reason: str = "", answer: dict[str, Any] | None = None) -> None:
        """The attempt was answered."""
        attempt = op.attempts[-1]
        attempt.ended, attempt.code, attempt.reason, attempt.answer = now, code, reason, answer or {}
        self.write(id=op.id, ended=now, code=code, reason=reason, answer=attempt.answer)


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a file; one that was cut off in the middle is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read(path: Path) -> list[Op]:
    """The operations of one client's journal, in their order."""
    ops: dict[str, Op] = {}
    for line in lines(path):
        if "op" in line:
            ops[line["id"]] = Op(**line["op"])
        if "began" in line:
            ops[line["id"]].attempts.append(Attempt(line["epoch"], line["began"]))
        else:
            last = ops[line["id"]].attempts[-1]
            last.ended, last.code, last.reason = line["ended"], line["code"], line["reason"]
            last.answer = line["answer"]
    return list(ops.values())


@dataclass(frozen=True)
class Epoch:
    """One life of the server."""

    number: int
    began: float
    ended: float
    how: str
    """How it ended: kill, before_rename, after_rename, after_commit, sigterm, …"""


@dataclass
class History:
    """All that happened."""

    ops: list[Op]
    epochs: dict[int, Epoch]
    clock: float = 0.0
    """Seconds since 1970 at 0 of the monotonic clock."""

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], list[Op]]:
        found: dict[tuple[str, str], list[Op]] = defaultdict(list)
        for op in self.ops:
            found[op.tenant, op.name].append(op)
        return found

    def about(self, tenant: str, name: str, *kinds: str) -> list[Op]:
        """The operations that name an adapter, of these kinds if any are given."""
        found = self._by_name.get((tenant, name), [])
        return [op for op in found if not kinds or op.kind in kinds]

    def between(self, since: float, until: float, tenant: str, name: str, *kinds: str) -> list[Op]:
        """The operations of these kinds that may have had their effect on an adapter between two times."""
        found = self.about(tenant, name, *kinds)
        return [op for op in found if op.possible and op.began < until and self.end_of(op) > since]

    def end_of(self, op: Op) -> float:
        """When it had certainly had its effect, if it ever has one."""
        ok = op.ok
        if ok is not None and ok.ended is not None:
            return ok.ended
        last = op.attempts[-1]
        return self.epochs[last.epoch].ended if last.epoch in self.epochs else float("inf")


def gather(folder: Path) -> History:
    """Reads the journals of a run."""
    ops = [op for path in sorted(folder.glob("client-*.jsonl")) for op in read(path)]
    epochs: dict[int, Epoch] = {}
    clock = 0.0
    for line in lines(folder / "server.jsonl"):
        if "clock" in line:
            clock = line["clock"]
        else:
            epochs[line["number"]] = Epoch(**line)
    return History([op for op in ops if op.attempts], epochs, clock)
