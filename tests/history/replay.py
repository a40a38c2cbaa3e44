"""The strongest check: every adapter's steps made again on a server that nobody disturbs, and every number compared.

    its making → at each version: all that was read of it → the passes of the next step → the step → …

Equal means bit for bit: logprobs, completions, scores, metrics, gradient norms, and the files of a download, moments
included. Where the history leaves open what went into a step (a pass whose outcome nobody learned), or which version a
copy began as, the ways it can have been are tried until one explains all that was seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from history.calls import Stubs, facts_of, refusal, request_of, send
from history.journal import Attempt, Op
from history.model import Key, Life, Model, Origin, Violation, answered

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
    _copies: dict[tuple[Key, int], str] = field(default_factory=dict)
    _wanted: set[tuple[Key, int]] = field(default_factory=set)
    _begun: set[Life] = field(default_factory=set)
    _violations: list[Violation] = field(default_factory=list)
    _names: int = 0

    def __post_init__(self) -> None:
        answer = self.stubs.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=3600))
        self._session = answer.session_id

    def check(self, model: Model, told: Callable[[int, int], None] = lambda _done, _all: None) -> list[Violation]:
        """All numbers of a history that are not those of the replay."""
        lives = list(model.all())
        for life in lives:
            self._wanted |= {way.base for ways in life.origins.values() for way in ways if way.base is not None}
        for done, life in enumerate(lives):
            told(done, len(lives))
            self._life(model, life)
        self._rewards(model)
        return self._violations

    def _rewards(self, model: Model) -> None:
        """The reward adapter is never trained: of the same rows it says the same to everybody, in every life."""
        wanted: dict[str, Any] = {}
        for op, attempt in answered(model.history.ops):
            if op.kind != "reward":
                continue
            rows = json.dumps(op.args["rows"])
            if rows not in wanted:
                wanted[rows] = self._send("reward", {"name": "", "rows": op.args["rows"]})["digest"]
            self.compared += 1
            if attempt.answer["digest"] != wanted[rows]:
                what = f"the reward of {rows} is not what the replay gives"
                self._violations.append(Violation("other numbers", what, (op,)))

    # ---------------------------------------------------------------------------------------------------- one adapter

    def _life(self, model: Model, life: Life) -> None:
        """Replays an adapter in the ways it can have been, until one is right; notes the best one's mismatches."""
        if life in self._begun:
            return
        self._begun.add(life)
        versions, options = list(life.origins), list(life.origins.values())
        if (version := next((version for version, ways in life.origins.items() if not ways), None)) is not None:
            self._violations.append(Violation("other numbers", f"{life}: nothing explains version {version}"))
            return
        chosen = completed(options)
        if chosen is None:
            unsure = {way.op.id: way.op for ways in options if len(ways) > 1 for way in ways if way.op is not None}
            what = f"{life}: in no way can all its versions have come to be"
            self._violations.append(Violation("other numbers", what, tuple(unsure.values())))
        best: list[Mismatch] | None = None
        for _ in range(_TRIES):
            if chosen is None:
                break
            way = [ways[choice] for ways, choice in zip(options, chosen, strict=True)]
            found = self._way(model, life, dict(zip(versions, way, strict=True)))
            best = found if best is None or len(found) < len(best) else best
            if not found:
                break
            self.retried += 1
            chosen = after(options, chosen, versions.index(found[0].version))
        for one in best or ():
            makers = (way.op for way in life.origins.get(one.version, ()) if way.op is not None)
            self._violations.append(Violation("other numbers", f"{life}: {one.what}", (one.op, *makers)))

    def _way(self, model: Model, life: Life, way: dict[int, Origin]) -> list[Mismatch]:
        """Replays an adapter in one way; returns what is not as it was seen."""
        found: list[Mismatch] = []
        name = ""
        version = life.first
        try:
            for version, origin in way.items():
                op = origin.op
                if op is None:  # that version never was: what comes next is another adapter
                    self._end(name)
                    name = ""
                    continue
                if op.kind == "step":
                    found += self._step(name, version, op, origin.passes)
                else:
                    self._end(name)
                    self._names += 1
                    name = f"l{self._names}"
                    if origin.base is not None and not self._copied(model, origin.base):
                        return [*found, Mismatch(version, f"it would be a copy of {origin.base}, never made", op)]
                    self._make(op, name, self._copies[origin.base] if origin.base is not None else "")
                found += self._compare(name, version, life.reads.get(version, []))
                if (life.key, version) in self._wanted:
                    self._copy(life, version, name)
        except grpc.RpcError as error:
            what = f"the replay was refused: {refusal(error)} {error.details()}"
            found.append(Mismatch(version, what, way[version].op or life.origins[life.first][0].op))
        finally:
            self._end(name)
        return found

    def _copied(self, model: Model, base: tuple[Key, int]) -> bool:
        """Whether there is a copy of a version; replays its adapter first, where its turn has not come."""
        for life in model.chains[base[0]].lives:
            if base[1] in life.origins:
                self._life(model, life)
        return base in self._copies

    def _end(self, name: str) -> None:
        if name:
            self._try("delete", {"name": name})

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
        self._copies[life.key, version] = copy

    def _compare(self, name: str, version: int, reads: list[tuple[Op, Attempt]]) -> Iterator[Mismatch]:
        wanted: dict[str, Any] = {}
        for op, attempt in reads:
            args = {key: value for key, value in op.args.items() if key != "name"}
            key = op.kind + json.dumps(args, sort_keys=True)
            if key not in wanted:
                wanted[key] = self._send(op.kind, {**args, "name": name})["digest"]
            self.compared += 1
            if attempt.answer["digest"] != wanted[key]:
                yield Mismatch(version, f"{op.kind} of version {version} is not what the replay gives", op)

    def _step(self, name: str, version: int, op: Op, passes: tuple[Op, ...]) -> Iterator[Mismatch]:
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


def completed(options: Sequence[Sequence[Origin]], begun: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    """The first way for all versions that begins so: of each version's options which. None: there is none.

    An operation makes a version once, and a step makes one only of an adapter that is there.
    """
    if len(begun) == len(options):
        return begun
    before = [options[at][choice].op for at, choice in enumerate(begun)]
    used = {op.id for op in before if op is not None}
    gone = bool(before) and before[-1] is None
    for choice, origin in enumerate(options[len(begun)]):
        op = origin.op
        if op is not None and (op.id in used or (op.kind == "step" and (gone or not before))):
            continue
        if (whole := completed(options, (*begun, choice))) is not None:
            return whole
    return None


def after(options: Sequence[Sequence[Origin]], chosen: tuple[int, ...], wrong: int) -> tuple[int, ...] | None:
    """The next way that is another one for the version at `wrong`, or for one before it."""
    for at in range(wrong, -1, -1):
        begun = chosen[:at]
        for choice in range(chosen[at] + 1, len(options[at])):
            only = [*options[:at], [options[at][choice]], *options[at + 1 :]]
            if (whole := completed(only, begun)) is not None:
                return (*begun, choice, *whole[at + 1 :])
    return None


def _own(op: Op, name: str) -> dict[str, Any]:
    return {key: value for key, value in op.args.items() if key not in _RELATIVE} | {"name": name}
