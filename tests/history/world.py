"""A server that is made up, for the checker's own tests, and the history of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from history import checks, model
from history.journal import OK, Attempt, Epoch, History, Op, Writer
from history.replay import Replayer

CLOCK = 1000.0


_CONDITIONS = ("name", "init_from", "replace", "expected_pending", "expected_version")
"""What a call names or asks for, and what its numbers do not depend on."""


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Engine:
    """Weights are the list of what was done to them."""

    def __init__(self) -> None:
        self.weights: dict[str, tuple[Any, ...]] = {}
        self.pending: dict[str, tuple[Any, ...]] = {}

    def do(self, kind: str, name: str, args: dict[str, Any]) -> dict[str, Any]:
        own = {key: args[key] for key in sorted(args) if key not in _CONDITIONS}
        if kind == "create":
            source = args.get("init_from")
            self.weights[name] = self.weights[source] if source else (digest(own),)
            self.pending[name] = ()
        elif kind == "pass":
            self.pending[name] += (digest(own),)
            return {"digest": digest(self.weights[name], own)}
        elif kind == "step":
            passes, self.pending[name] = self.pending[name], ()
            self.weights[name] += ((passes, digest(own)),)
            return {"norm": digest(self.weights[name]), "applied": len(passes)}
        elif kind == "delete":
            del self.weights[name], self.pending[name]
        weights = None if kind == "reward" else self.weights.get(name)
        return {"digest": digest(weights, kind, own)}


class World:
    """A server that does as it should, and everything written down. Tests then change what was written."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.versions: dict[str, int] = {}
        self.created: dict[str, float] = {}
        self.ops: list[Op] = []
        self.now = 0.0
        self.epoch = 0

    def do(
        self, kind: str, name: str = "", *, tenant: str = "red", session: str = "s1", code: str = OK,
        happens: bool = True, **args: Any,
    ) -> Op:  # fmt: skip
        """An operation that is answered with `code`; `happens` says whether it has its effect."""
        self.now += 1.0
        own = {"name": name, **args} if name else args
        known = f"0.0.{len(self.ops)}"
        op = Op(known, kind, 0, tenant, session, known if kind in ("create", "delete", "pass", "step") else "", own)
        answer = self._answer(kind, f"{tenant}/{name}", own, tenant) if happens else {}
        op.attempts.append(Attempt(self.epoch, self.now, self.now + 0.5, code, "", answer if code == OK else {}))
        self.ops.append(op)
        return op

    def _answer(self, kind: str, key: str, args: dict[str, Any], tenant: str) -> dict[str, Any]:
        if "init_from" in args:
            args = {**args, "init_from": f"{tenant}/{args['init_from']}"}
        found = self.engine.do(kind, key, args)
        if kind == "create":
            self.versions[key], self.created[key] = self.versions.get(key, -1) + 1, CLOCK + self.now + 0.2
        if kind == "step":
            self.versions[key] += 1
        if kind == "pass":
            found["pending"] = len(self.engine.pending[key])
        if kind == "delete":
            del self.created[key]
            return {"raw": "x"}
        if kind == "list":
            there = [(one, one.removeprefix(f"{tenant}/")) for one in self.created if one.startswith(f"{tenant}/")]
            return {"adapters": [[name, self.created[one], self.versions[one]] for one, name in there], "raw": "x"}
        answer = {**found, "version": self.versions.get(key, 0), "raw": digest(found)}
        if kind in ("create", "get"):
            answer["created"] = self.created[key]
        if kind in ("open", "session", "active"):
            answer = {"session": "s1", "active": args.get("name", ""), "ttl": 60.0, "raw": "x"}
        return answer

    def refuse(self, kind: str, name: str, code: str, reason: str, **named: Any) -> Op:
        """An operation that is refused, and has no effect."""
        op = self.do(kind, name, code=code, happens=False, **named)
        op.attempts[0].reason = reason
        return op

    def train(self, name: str, rows: int, **named: Any) -> Op:
        """A pass and a step."""
        self.do("pass", name, rows=[rows], loss="cross_entropy", **named)
        return self.do("step", name, rate=0.1, **named)

    def restart(self) -> None:
        """The server is killed, and with it go the gradients that wait."""
        self.epoch += 1
        self.engine.pending = dict.fromkeys(self.engine.pending, ())

    def write(self, folder: Path) -> None:
        """As a journal."""
        Writer(folder / "server.jsonl").write(clock=CLOCK)
        writer = Writer(folder / "client-0.jsonl")
        for op in self.ops:
            told = Op(**{**vars(op), "attempts": []})
            for one in op.attempts:
                writer.begin(told, one.epoch, one.began)
                writer.end(told, one.ended or 0.0, one.code, one.reason, one.answer)

    def violations(self, tmp_path: Path) -> set[str]:
        """The names of the rules that are broken."""
        epochs = {number: Epoch(number, 0.0, self.now + 10, "kill") for number in range(self.epoch + 1)}
        found = model.build(History(self.ops, epochs, CLOCK))
        return {one.rule for one in [*checks.check(found), *Quiet(tmp_path).check(found)]}


class Quiet(Replayer):
    """Replays on the engine above."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, folder)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        self.engine = Engine()

    def _send(self, kind: str, args: dict[str, Any], data: bytes = b"") -> dict[str, Any]:
        found = self.engine.do(kind, args["name"], args)
        return {"pending": 0, **found}


def last(world: World, kind: str, tenant: str = "red") -> Op:
    return next(op for op in reversed(world.ops) if (op.kind, op.tenant) == (kind, tenant))
