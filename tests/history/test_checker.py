"""The checker itself: an honest history passes, and each lie in one is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from history import checks, model
from history.audit import audit
from history.journal import AMBIGUOUS, LAST_LOOK, OK, Attempt, Op, Writer, gather
from history.model import Origin
from history.replay import after, completed
from history.world import CLOCK, World, last

from onebase.v1 import adapters_pb2


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
    world.do("list").attempts[0].answer["adapters"] += [["other", CLOCK + 3.0, 0]]
    assert world.violations(tmp_path) == {"an adapter that nobody made"}


def test_a_name_that_was_taken(world: World, tmp_path: Path) -> None:
    world.do("create", "p", session="red", rank=2, seed=7)
    assert world.violations(tmp_path) == {"a name that was taken"}


def test_a_name_that_may_have_been_free_again(world: World, tmp_path: Path) -> None:
    world.do("delete", "p", session="red", code="UNAVAILABLE")
    world.do("create", "p", session="red", rank=2, seed=7)
    assert world.violations(tmp_path) == set()


def test_an_adapter_that_no_list_shows(world: World, tmp_path: Path) -> None:
    world.do("list").attempts[0].answer["adapters"] = []
    assert world.violations(tmp_path) == {"an adapter that no list shows"}


@pytest.mark.parametrize("code", [OK, "UNAVAILABLE"])
def test_an_adapter_that_no_list_needs_to_show(world: World, tmp_path: Path, code: str) -> None:
    world.do("create", "copy", init_from="p", seed=0)
    world.do("list")
    world.do("delete", "copy", code=code)
    world.do("list")
    assert world.violations(tmp_path) == set()


@pytest.mark.parametrize(
    ("told", "rules"),
    [
        (("UNAVAILABLE", "LOADING"), {"a last look that failed"}),
        (("NOT_FOUND", "ADAPTER_NOT_FOUND"), {"an adapter that no list shows", "an adapter that disappeared"}),
    ],
)
def test_the_last_look_asks_for_what_no_list_shows(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: tuple[str, str], rules: set[str]
) -> None:
    """A server that has lost everything in its last restart, and lists nothing."""

    def send(_stubs: Any, kind: str, *_: Any) -> list[Any]:
        if kind == "download" or told[1] == "LOADING":
            raise grpc.RpcError
        return [adapters_pb2.ListAdaptersResponse()]

    world.write(tmp_path)
    monkeypatch.setattr("history.audit.send", send)
    monkeypatch.setattr("history.audit.refusal", lambda _: told)
    audit(tmp_path, "127.0.0.1:1", {"red": "", "blue": ""}, 0)
    looks = [op for op in gather(tmp_path).ops if op.client >= LAST_LOOK]
    assert [(op.tenant, op.kind, op.name) for op in looks if op.kind == "download"] == [
        ("red", "download", "p"), ("blue", "download", "p"),
    ]  # fmt: skip
    found = checks.check(model.build(gather(tmp_path)))
    assert {one.rule for one in found} == rules
    assert {op.tenant for one in found for op in one.ops if op in looks} == {"red", "blue"}


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


def test_a_reward_that_changed(world: World, tmp_path: Path) -> None:
    world.do("reward", rows=[0])
    world.do("reward", tenant="blue", rows=[0])
    assert world.violations(tmp_path) == set()
    world.do("reward", rows=[0]).attempts[0].answer["digest"] = "other"
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
