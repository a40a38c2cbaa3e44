"""The checker itself: an honest history passes, and each lie in one is found and named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from history import checks, model
from history.journal import AMBIGUOUS, OK, Attempt, Epoch, History, Op, Writer, gather
from history.model import Origin
from history.replay import Replayer, after, completed

CLOCK = 1000.0


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Engine:
    """Weights are the list of what was done to them."""

    def __init__(self) -> None:
        self.weights: dict[str, tuple[Any, ...]] = {}
        self.pending: dict[str, tuple[Any, ...]] = {}

    def do(self, kind: str, name: str, args: dict[str, Any]) -> dict[str, Any]:
        own = {key: args[key] for key in sorted(args) if key not in ("name", "init_from")}
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
        return {"digest": digest(self.weights.get(name), kind, own)}


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
            return {"raw": "x"}
        answer = {**found, "version": self.versions.get(key, 0), "raw": digest(found)}
        if kind in ("create", "get"):
            answer["created"] = self.created[key]
        if kind in ("open", "session", "active"):
            answer = {"session": "s1", "active": args.get("name", ""), "ttl": 60.0, "raw": "x"}
        return answer

    def train(self, name: str, rows: int, **named: Any) -> Op:
        """A pass and a step."""
        self.do("pass", name, rows=[rows], loss="cross_entropy", **named)
        return self.do("step", name, rate=0.1, **named)

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


@pytest.fixture
def world() -> World:
    """Two tenants with an adapter each of one name, trained and read."""
    world = World()
    for tenant, seed in (("red", 1), ("blue", 2)):
        world.do("create", "p", tenant=tenant, session=tenant, rank=2, seed=seed)
        for rows in (1, 2):
            world.train("p", rows, tenant=tenant, session=tenant)
            world.do("logprob", "p", tenant=tenant, rows=[0])
        world.do("get", "p", tenant=tenant)
    return world


def last(world: World, kind: str, tenant: str = "red") -> Op:
    return next(op for op in reversed(world.ops) if (op.kind, op.tenant) == (kind, tenant))


def test_an_honest_history_passes(world: World, tmp_path: Path) -> None:
    world.do("create", "copy", init_from="p", seed=0)
    world.train("copy", 5)
    world.do("logprob", "copy", rows=[0])
    world.do("delete", "p", session="red")
    world.do("create", "p", rank=4, seed=3)
    world.train("p", 7)
    world.do("logprob", "p", rows=[0])
    assert world.violations(tmp_path) == set()


def test_a_lost_step(world: World, tmp_path: Path) -> None:
    last(world, "get").attempts[0].answer["version"] = 1
    assert world.violations(tmp_path) == {"a version that was lost"}


def test_a_doubled_step_shows_in_the_version(world: World, tmp_path: Path) -> None:
    last(world, "get").attempts[0].answer["version"] = 3
    assert "a version that nobody made" in world.violations(tmp_path)


def test_a_doubled_step_shows_in_the_numbers(world: World, tmp_path: Path) -> None:
    """A pass that was added twice under one step."""
    world.do("pass", "p", session="red", rows=[5], loss="cross_entropy")
    world.engine.pending["red/p"] *= 2
    world.do("step", "p", session="red", rate=0.1).attempts[0].answer["applied"] = 1
    world.do("logprob", "p", rows=[0])
    assert world.violations(tmp_path) == {"other numbers"}


def test_a_version_given_twice(world: World, tmp_path: Path) -> None:
    world.versions["red/p"] = 1
    world.train("p", 9, session="red")
    assert "a version given twice" in world.violations(tmp_path)


def test_a_resurrected_adapter(world: World, tmp_path: Path) -> None:
    before = last(world, "get").attempts[0].answer
    world.do("delete", "p", session="red")
    world.do("list").attempts[0].answer = {"adapters": [["p", before["created"], before["version"]]], "raw": "x"}
    assert world.violations(tmp_path) == {"a resurrected adapter"}


def test_an_adapter_that_disappeared(world: World, tmp_path: Path) -> None:
    world.do("get", "p", code="NOT_FOUND", happens=False).attempts[0].reason = "ADAPTER_NOT_FOUND"
    assert world.violations(tmp_path) == {"an adapter that disappeared"}


def test_a_delete_that_nobody_heard_of_may_have_happened(world: World, tmp_path: Path) -> None:
    world.do("delete", "p", session="red", code="UNAVAILABLE", happens=False)
    world.do("get", "p", code="NOT_FOUND", happens=False).attempts[0].reason = "ADAPTER_NOT_FOUND"
    assert world.violations(tmp_path) == set()


def test_an_adapter_that_nobody_made(world: World, tmp_path: Path) -> None:
    found = world.do("list").attempts[0]
    found.answer = {"adapters": [["other", CLOCK + 3.0, 0]], "raw": "x"}
    assert world.violations(tmp_path) == {"an adapter that nobody made"}


def test_a_foreign_adapter_seen(world: World, tmp_path: Path) -> None:
    blue = last(world, "get", "blue").attempts[0].answer
    last(world, "get").attempts[0].answer["created"] = blue["created"]
    assert "another tenant's adapter" in world.violations(tmp_path)


def test_a_foreign_name_answered(world: World, tmp_path: Path) -> None:
    world.do("create", "only_blue", tenant="blue", rank=2, seed=1)
    world.do("reward", "only_blue", tenant="red", rows=[0])
    assert "another tenant's adapter" in world.violations(tmp_path)


@pytest.mark.parametrize("kind", ["logprob", "step", "pass"])
def test_a_number_that_changed(world: World, tmp_path: Path, kind: str) -> None:
    answer = last(world, kind).attempts[0].answer
    answer["norm" if kind == "step" else "digest"] = "other"
    assert world.violations(tmp_path) == {"other numbers"}


def test_a_step_that_nobody_heard_of_is_believed_where_it_shows(world: World, tmp_path: Path) -> None:
    world.do("pass", "p", session="red", rows=[5], loss="cross_entropy")
    world.do("step", "p", session="red", rate=0.1, code="DEADLINE_EXCEEDED")
    world.train("p", 6, session="red")
    world.do("logprob", "p", rows=[0])
    assert world.violations(tmp_path) == set()


@pytest.mark.parametrize("happened", [True, False])
def test_adapters_known_by_their_numbers_alone(world: World, tmp_path: Path, happened: bool) -> None:
    """Deleted, made again, and stepped, and nobody ever heard that; the numbers tell which of it was done."""
    world.do("delete", "p", session="red", code="UNAVAILABLE", happens=happened)
    world.do("create", "p", session="red", rank=2, seed=7, code="UNAVAILABLE", happens=happened)
    world.do("pass", "p", session="red", rows=[3], loss="value", code="UNAVAILABLE", happens=not happened)
    world.do("step", "p", session="red", rate=0.5, code="UNAVAILABLE", happens=not happened)
    world.do("logprob", "p", rows=[0])
    world.train("p", 4, session="red")
    world.do("logprob", "p", rows=[0])
    world.do("create", "copy", init_from="p", seed=0, code="UNAVAILABLE")
    world.do("logprob", "copy", rows=[0])
    assert world.violations(tmp_path) == set()


def test_numbers_that_no_unknown_operation_explains(world: World, tmp_path: Path) -> None:
    world.do("delete", "p", session="red", code="UNAVAILABLE")
    world.do("create", "p", session="red", rank=2, seed=7, code="UNAVAILABLE")
    world.do("logprob", "p", rows=[0]).attempts[0].answer["digest"] = "other"
    assert world.violations(tmp_path) == {"other numbers"}


def test_an_adapter_whose_version_leaves_many_out(world: World, tmp_path: Path) -> None:
    """Nobody heard of its making, nor of a step that is repeated all the time: neither is tried at every version."""
    for code in ("CANCELLED", "UNAVAILABLE", "UNAVAILABLE"):
        world.do("pass", "p", session="red", rows=[3], loss="value", code=code, happens=False)
        world.do("step", "p", session="red", rate=0.5, code=code, happens=False)
    world.do("delete", "p", session="red")
    world.versions["red/p"] += 30
    world.do("create", "p", session="red", rank=2, seed=7, code="UNAVAILABLE")
    world.do("logprob", "p", rows=[0])
    world.train("p", 4, session="red")
    assert world.violations(tmp_path) == set()


def test_an_operation_makes_one_version_and_a_step_needs_an_adapter() -> None:
    made, step, other = (
        Origin(Op(one, kind, 0, "red", "s", "", {})) for one, kind in (("a", "load"), ("b", "step"), ("c", "load"))
    )
    none = Origin(None)
    assert completed([[made], [step, none], [step, other]]) == (0, 0, 1)
    assert completed([[made], [none], [step, other], [step]]) == (0, 0, 1, 0)
    assert completed([[made], [none], [step]]) is None
    assert completed([[step]]) is None
    options = [[made], [step, other, none], [step, other]]
    ways = [first := completed(options)]
    while (following := after(options, ways[-1], 2)) is not None:
        ways.append(following)
    assert first == (0, 0, 1)
    assert ways == [(0, 0, 1), (0, 1, 0), (0, 2, 1)]
    assert after(options, (0, 0, 1), 1) == (0, 1, 0)
    assert after(options, (0, 0, 1), 0) is None


def test_an_adapter_that_began_where_it_had_been(world: World, tmp_path: Path) -> None:
    world.do("delete", "p", session="red")
    world.versions["red/p"] = -1
    world.do("create", "p", session="red", rank=2, seed=7)
    assert "a version given twice" in world.violations(tmp_path)


@pytest.mark.parametrize("happened", [True, False])
def test_a_pass_that_nobody_heard_of_is_tried_both_ways(world: World, tmp_path: Path, happened: bool) -> None:
    world.do("pass", "p", session="red", rows=[3], loss="value", code="CANCELLED", happens=happened)
    if not happened:
        world.do("pass", "p", session="red", rows=[4], loss="value", code="CANCELLED")
    world.train("p", 6, session="red")
    world.do("logprob", "p", rows=[0])
    assert world.violations(tmp_path) == set()


def test_a_lease_held_twice(world: World, tmp_path: Path) -> None:
    world.train("p", 4, session="another")
    assert world.violations(tmp_path) == {"a lease held twice"}


def test_a_lease_that_was_given_back(world: World, tmp_path: Path) -> None:
    world.do("close", session="red")
    world.train("p", 4, session="another")
    assert world.violations(tmp_path) == set()


def test_another_answer_to_a_repeated_call(world: World, tmp_path: Path) -> None:
    op = last(world, "step")
    again = {**op.attempts[0].answer, "raw": "other"}
    op.attempts.append(Attempt(0, world.now + 1, world.now + 2, OK, "", again))
    assert world.violations(tmp_path) == {"another answer to a repeated call"}


def test_a_request_id_reused(world: World, tmp_path: Path) -> None:
    world.do("reuse", of="step", epoch=0)
    assert world.violations(tmp_path) == {"a request_id reused"}


def test_a_session_that_was_lost(world: World, tmp_path: Path) -> None:
    world.do("open", ttl=60.0).session = ""
    world.do("session", code="NOT_FOUND", happens=False).attempts[0].reason = "SESSION_NOT_FOUND"
    assert world.violations(tmp_path) == {"a session that was lost"}


def test_another_active_adapter(world: World, tmp_path: Path) -> None:
    world.do("open", ttl=60.0).session = ""
    world.do("active", "p")
    found = world.do("session").attempts[0].answer
    found["active"] = "q"
    assert world.violations(tmp_path) == {"another active adapter"}


def test_a_killed_client_leaves_an_operation_of_unknown_outcome(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "client-0.jsonl")
    op = Op("0.0.1", "step", 0, "red", "s", "0.0.1", {"name": "p"})
    writer.begin(op, 0, 1.0)
    (read,) = gather(tmp_path).ops
    assert (read.unknown, read.attempts[0].code in AMBIGUOUS) == (True, True)
    writer.end(op, 2.0, "FAILED_PRECONDITION", "NO_GRADIENTS")
    (read,) = gather(tmp_path).ops
    assert (read.unknown, read.ok) == (False, None)


def test_a_stored_answer_says_nothing_of_what_is_there_now(world: World, tmp_path: Path) -> None:
    """A client that was away asks again for the answer of long ago; its adapter is another one by now."""
    op = next(op for op in world.ops if (op.kind, op.tenant) == ("step", "red"))
    world.do("delete", "p", session="red")
    world.do("create", "p", session="red", rank=2, seed=1)
    op.attempts.append(Attempt(0, world.now + 1, world.now + 2, OK, "", op.attempts[0].answer))
    world.now += 3
    world.do("get", "p")
    assert world.violations(tmp_path) == set()
