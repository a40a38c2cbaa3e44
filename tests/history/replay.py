"""The strongest check: every adapter's steps made again on a server that nobody disturbs, and every number compared.

    its making → at each version: all that was read of it → the passes of the next step → the step → …

Equal means bit for bit: logprobs, completions, scores, metrics, gradient norms, and the files of a download, moments
included. Where the history leaves open what went into a step (a pass whose outcome nobody learned), or which version a
copy began as, the ways it can have been are tried until one explains all that was seen.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from history.calls import Stubs, facts_of, refusal, request_of, send
from history.journal import Attempt, Op
from history.model import Life, Model, Violation

from onebase.v1 import sessions_pb2

_TIMEOUT = 120.0
_TRIES = 48
"""So many ways are tried for one adapter."""
_RELATIVE = ("expected_pending", "expected_version", "replace", "name")


@dataclass(frozen=True)
class Mismatch:
    """A number that is not what the replay gives."""

    version: int
    what: str
    op: Op
    attempt: Attempt | None = None


@dataclass
class Replayer:
    """Replays adapters on a server of its own.

    Args:
        stubs: of that server; whoever calls may do everything there.
        folder: of the run: what was uploaded lies in its `blobs`.
    """

    stubs: Stubs
    folder: Path
    calls: int = 0
    compared: int = 0
    retried: int = 0
    """Ways that were tried and did not explain what was seen."""
    _copies: dict[tuple[Life, int], str] = field(default_factory=dict)
    _names: int = 0

    def __post_init__(self) -> None:
        answer = self.stubs.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=3600))
        self._session = answer.session_id

    def check(self, model: Model, told: Callable[[int, int], None] = lambda _done, _all: None) -> list[Violation]:
        """All numbers of a history that are not those of the replay."""
        lives, wanted = list(model.all()), _copied(model)
        wrong: dict[tuple[str, float], list[tuple[Life, Mismatch]]] = defaultdict(list)
        right: set[tuple[str, float]] = set()
        violations = []
        for done, life in enumerate(lives):
            told(done, len(lives))
            if life.maker is None:
                continue
            for mismatch in self._life(life, _bases(model, life), wanted.get(life, set()), right):
                if mismatch.attempt is None:
                    violations.append(Violation("other numbers", f"{life}: {mismatch.what}", (mismatch.op,)))
                else:
                    wrong[mismatch.op.id, mismatch.attempt.began].append((life, mismatch))
        for key, found in wrong.items():
            if key not in right:  # a read may be about one of several adapters: one of them must explain it
                life, mismatch = found[0]
                maker = life.steps[mismatch.version].op if mismatch.version in life.steps else life.maker
                around = (mismatch.op, *((maker,) if maker else ()))
                violations.append(Violation("other numbers", f"{life}: {mismatch.what}", around))
        return violations

    # ---------------------------------------------------------------------------------------------------- one adapter

    def _life(
        self, life: Life, bases: list[tuple[Life, int]], copied: set[int], right: set[tuple[str, float]]
    ) -> list[Mismatch]:
        """Replays an adapter in the ways it can have been, until one is right; returns the best one's mismatches."""
        ways = {life.first: len(bases)} if bases else {}
        ways |= {version: len(step.options) for version, step in life.steps.items()}
        if not all(ways.values()):
            version = next(version for version, count in ways.items() if not count)
            op = life.steps[version].op if version in life.steps else life.maker
            assert op is not None
            return [Mismatch(version, f"nothing explains version {version}", op)]
        chosen = dict.fromkeys(sorted(ways), 0)
        best: list[Mismatch] | None = None
        for _ in range(_TRIES):
            good: set[tuple[str, float]] = set()
            found = self._way(life, bases, chosen, copied, good)
            if best is None or len(found) < len(best):
                best, best_good = found, good
            if not found:
                break
            self.retried += 1
            at = next((v for v in reversed(chosen) if v <= found[0].version and chosen[v] + 1 < ways[v]), None)
            if at is None:
                break
            chosen = {v: choice + (v == at) if v <= at else 0 for v, choice in chosen.items()}
        assert best is not None
        right |= best_good
        return best

    def _way(
        self, life: Life, bases: list[tuple[Life, int]], chosen: dict[int, int], copied: set[int],
        good: set[tuple[str, float]],
    ) -> list[Mismatch]:  # fmt: skip
        reads = _by_version(life)
        found: list[Mismatch] = []
        assert life.maker is not None
        self._names += 1
        name = f"l{self._names}"
        try:
            base = self._copies.get(bases[chosen[life.first]], "") if bases else ""
            if bases and not base:
                source, version = bases[chosen[life.first]]
                return [
                    Mismatch(life.first, f"it would be a copy of version {version} of {source}, never made", life.maker)
                ]
            self._make(life.maker, name, base)
            version = life.first
            while True:
                found += self._compare(name, version, reads.get(version, []), good)
                if version in copied:
                    self._copy(life, version, name)
                if (step := life.steps.get(version + 1)) is None:
                    break
                version += 1
                found += self._step(name, version, step.op, step.options[chosen[version]])
        except grpc.RpcError as error:
            found.append(Mismatch(life.last, f"the replay was refused: {refusal(error)} {error.details()}", life.maker))
        finally:
            self._try("delete", {"name": name})
        return found

    def _make(self, maker: Op, name: str, base: str) -> None:
        args = {key: value for key, value in maker.args.items() if key not in _RELATIVE} | {"name": name}
        if base:
            args["init_from"] = base
        if maker.kind == "load":
            args["path"] = f"{maker.tenant}/{args['path']}"  # whoever replays has the root, and a tenant a part of it
        data = (self.folder / "blobs" / args["blob"]).read_bytes() if maker.kind == "upload" else b""
        self._send(maker.kind, args, data)

    def _copy(self, life: Life, version: int, name: str) -> None:
        """Keeps a version for those that began as a copy of it."""
        self._names += 1
        copy = f"c{self._names}"
        self._send("create", {"name": copy, "init_from": name, "seed": 0})
        self._copies[life, version] = copy

    def _compare(
        self, name: str, version: int, reads: list[tuple[Op, Attempt]], good: set[tuple[str, float]]
    ) -> Iterator[Mismatch]:
        wanted: dict[str, Any] = {}
        for op, attempt in reads:
            args = {key: value for key, value in op.args.items() if key != "name"}
            key = op.kind + json.dumps(args, sort_keys=True)
            if key not in wanted:
                wanted[key] = self._send(op.kind, {**args, "name": name})["digest"]
            self.compared += 1
            if attempt.answer["digest"] != wanted[key]:
                yield Mismatch(version, f"{op.kind} of version {version} is not what the replay gives", op, attempt)
            else:
                good.add((op.id, attempt.began))

    def _step(self, name: str, version: int, op: Op, passes: list[Op]) -> Iterator[Mismatch]:
        for one in passes:
            found = self._send("pass", _own(one, name))
            for attempt in one.attempts:
                if attempt.epoch == op.attempts[0].epoch and "digest" in attempt.answer:
                    self.compared += 1
                    if attempt.answer["digest"] != found["digest"]:
                        yield Mismatch(version, f"a pass before version {version} gave other numbers", one)
        found = self._send("step", _own(op, name))
        if (ok := op.ok) is not None:
            self.compared += 1
            if (ok.answer["norm"], ok.answer["applied"]) != (found["norm"], found["applied"]):
                was = f"{ok.answer['norm']!r} of {ok.answer['applied']} passes"
                now = f"{found['norm']!r} of {found['applied']}"
                yield Mismatch(version, f"the gradient of version {version} had the norm {was}, and has {now}", op)

    def _send(self, kind: str, args: dict[str, Any], data: bytes = b"") -> dict[str, Any]:
        request = request_of(kind, args)
        if kind not in ("get", "list", "logprob", "generate", "score", "download"):
            request.session_id = self._session
        self.calls += 1
        return facts_of(kind, send(self.stubs, kind, request, _TIMEOUT, None, data))

    def _try(self, kind: str, args: dict[str, Any]) -> None:
        try:
            self._send(kind, args)
        except grpc.RpcError:
            return


def _own(op: Op, name: str) -> dict[str, Any]:
    return {key: value for key, value in op.args.items() if key not in _RELATIVE} | {"name": name}


def _by_version(life: Life) -> dict[int, list[tuple[Op, Attempt]]]:
    found: dict[int, list[tuple[Op, Attempt]]] = defaultdict(list)
    for op, attempt, version in life.reads:
        if op.kind not in ("pass", "reward") and len(attempt.answer.get("versions", [0])) == 1:
            found[version].append((op, attempt))
    return found


def _bases(model: Model, life: Life) -> list[tuple[Life, int]]:
    """Which version of which adapter a copy can have begun as, the newest first; nothing for what is no copy."""
    maker = life.maker
    if maker is None or "init_from" not in maker.args:
        return []
    began, ended = maker.began, life.created - model.history.clock + 0.05
    found = []
    for source in model.lives.get((life.tenant, maker.args["init_from"]), ()):
        if source is life or source.maker is None or source.maker.began > ended or source.dead < began:
            continue
        for version in range(source.first, source.last + 1):
            step, later = source.steps.get(version), source.steps.get(version + 1)
            asked = step.op.began if step is not None else source.maker.began
            over = later.op.ok.ended if later is not None and later.op.ok is not None else None
            if asked <= ended and (over is None or over >= began):
                found.append((source, version))
    return found[::-1]


def _copied(model: Model) -> dict[Life, set[int]]:
    """Which versions of which adapters others can have begun as."""
    found: dict[Life, set[int]] = defaultdict(set)
    for life in model.all():
        for source, version in _bases(model, life):
            found[source].add(version)
    return found
