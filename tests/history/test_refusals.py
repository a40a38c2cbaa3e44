"""The checker's rules for passes, fences and refusals: each lie is found, and what has a cause is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from history.journal import OK
from history.world import World

LOST, FENCE, CAUSELESS = "a pass that was lost", "a fence that did not hold", "a refusal without a cause"
UNDECLARED = "an answer that no page declares"


def passes(world: World, count: int, **named: Any) -> None:
    """So many passes of red's adapter, whose version is 2."""
    for row in range(count):
        world.do("pass", "p", session="red", rows=[row], loss="cross_entropy", **named)


def step(world: World, **named: Any) -> None:
    world.do("step", "p", session="red", rate=0.1, **named)


# -------------------------------------------------------------------------------------------------------------- passes


def test_a_pass_that_a_step_left_out(world: World, tmp_path: Path) -> None:
    passes(world, 2)
    world.engine.pending["red/p"] = world.engine.pending["red/p"][:1]
    step(world)
    assert world.violations(tmp_path) == {LOST}


def test_a_pass_that_the_next_one_does_not_count(world: World, tmp_path: Path) -> None:
    passes(world, 1)
    world.engine.pending["red/p"] = ()
    passes(world, 1)
    step(world)
    assert world.violations(tmp_path) == {LOST}


def test_a_pass_that_went_with_its_server(world: World, tmp_path: Path) -> None:
    passes(world, 2)
    world.restart()
    world.refuse("step", "p", "FAILED_PRECONDITION", "NO_GRADIENTS", session="red")
    world.refuse("pass", "p", "FAILED_PRECONDITION", "GRADIENTS_LOST", session="red", expected_pending=2)
    passes(world, 1)
    step(world)
    assert world.violations(tmp_path) == set()


def test_a_pass_that_went_with_its_lease(world: World, tmp_path: Path) -> None:
    passes(world, 2)
    world.do("close", session="red")
    world.engine.pending["red/p"] = ()
    world.refuse("step", "p", "FAILED_PRECONDITION", "NO_GRADIENTS", session="another")
    world.train("p", 3, session="another")
    assert world.violations(tmp_path) == set()


@pytest.mark.parametrize("kind", ["pass", "step"])
@pytest.mark.parametrize(("waiting", "found"), [(2, {LOST}), (1, set())])
def test_gradients_that_are_said_to_be_lost(
    world: World, tmp_path: Path, kind: str, waiting: int, found: set[str]
) -> None:
    passes(world, waiting)
    world.refuse(kind, "p", "FAILED_PRECONDITION", "GRADIENTS_LOST", session="red", expected_pending=2)
    assert world.violations(tmp_path) == found


def test_no_gradients_after_a_pass(world: World, tmp_path: Path) -> None:
    passes(world, 1)
    world.refuse("step", "p", "FAILED_PRECONDITION", "NO_GRADIENTS", session="red")
    assert world.violations(tmp_path) == {LOST}


@pytest.mark.parametrize("kind", ["step", "delete"])
def test_no_gradients_after_what_may_have_taken_them(world: World, tmp_path: Path, kind: str) -> None:
    passes(world, 1)
    world.do(kind, "p", session="red", code="UNAVAILABLE", happens=False)
    world.refuse("step", "p", "FAILED_PRECONDITION", "NO_GRADIENTS", session="red")
    assert world.violations(tmp_path) == set()


# -------------------------------------------------------------------------------------------------------------- fences


@pytest.mark.parametrize("kind", ["pass", "step"])
@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ({"expected_version": 0}, {FENCE}),
        ({"expected_pending": 3}, {FENCE}),
        ({"expected_version": 2, "expected_pending": 2}, set()),
        ({"expected_pending": 1}, set()),
    ],
)
def test_a_fence_holds(world: World, tmp_path: Path, kind: str, expected: dict[str, int], found: set[str]) -> None:
    passes(world, 2)
    {"pass": lambda **named: passes(world, 1, **named), "step": lambda **named: step(world, **named)}[kind](**expected)
    assert world.violations(tmp_path) == found


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("kind", "code", "reason", "named"),
    [
        ("pass", "ABORTED", "NOT_LEASE_HOLDER", {}),
        ("active", "ABORTED", "ADAPTER_LEASED", {}),
        ("pass", "ABORTED", "VERSION_MISMATCH", {"expected_version": 2}),
        ("step", "ABORTED", "VERSION_MISMATCH", {}),
        ("load", "ABORTED", "VERSION_MISMATCH", {"replace": True}),
        ("load", "ABORTED", "ADAPTER_BUSY", {"replace": True}),
        ("pass", "FAILED_PRECONDITION", "GRADIENTS_LOST", {}),
    ],
)
def test_a_refusal_without_a_cause(
    world: World, tmp_path: Path, kind: str, code: str, reason: str, named: dict[str, Any]
) -> None:
    world.refuse(kind, "p", code, reason, session="red", **named)
    assert world.violations(tmp_path) == {CAUSELESS}


def test_a_lease_that_a_restart_has_lost(world: World, tmp_path: Path) -> None:
    world.restart()
    world.refuse("pass", "p", "ABORTED", "NOT_LEASE_HOLDER", session="red")
    assert world.violations(tmp_path) == {CAUSELESS}


def test_a_lease_that_another_may_hold(world: World, tmp_path: Path) -> None:
    world.refuse("pass", "p", "ABORTED", "NOT_LEASE_HOLDER", session="another")
    world.do("delete", "p", session="red", code="UNAVAILABLE", happens=False)
    world.refuse("pass", "p", "ABORTED", "NOT_LEASE_HOLDER", session="red")
    assert world.violations(tmp_path) == set()


def test_a_lease_that_ran_out(world: World, tmp_path: Path) -> None:
    world.now += 60.0
    world.refuse("pass", "p", "ABORTED", "NOT_LEASE_HOLDER", session="red")
    assert world.violations(tmp_path) == set()


def test_a_version_that_may_be_another(world: World, tmp_path: Path) -> None:
    world.refuse("pass", "p", "ABORTED", "VERSION_MISMATCH", session="red", expected_version=1)
    world.do("step", "p", session="red", code="UNAVAILABLE", happens=False)
    world.refuse("pass", "p", "ABORTED", "VERSION_MISMATCH", session="red", expected_version=2)
    world.refuse("load", "p", "ABORTED", "VERSION_MISMATCH", session="red", replace=True)
    assert world.violations(tmp_path) == set()


@pytest.mark.parametrize("deleted", [True, False])
def test_a_name_that_is_said_to_be_taken(world: World, tmp_path: Path, deleted: bool) -> None:
    world.do("delete", "p", session="red", code=OK if deleted else "UNAVAILABLE")
    world.refuse("create", "p", "ALREADY_EXISTS", "ADAPTER_EXISTS", session="red", rank=2, seed=7)
    assert world.violations(tmp_path) == ({CAUSELESS} if deleted else set())


def test_a_name_that_another_call_keeps(world: World, tmp_path: Path) -> None:
    """Also where that call is refused in the end: it had the name while it was under way."""
    world.do("delete", "p", session="red")
    other = world.refuse("create", "p", "NOT_FOUND", "ADAPTER_NOT_FOUND", init_from="q", seed=0)
    world.refuse("create", "p", "ALREADY_EXISTS", "ADAPTER_EXISTS", session="red", rank=2, seed=7)
    world.refuse("pass", "p", "ABORTED", "ADAPTER_BUSY", session="red")
    other.attempts[0].ended = world.now + 1.0
    assert world.violations(tmp_path) == set()


# ----------------------------------------------------------------------------------------------- errors, and too many


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN", "DATA_LOSS", "INVALID_ARGUMENT"])
@pytest.mark.parametrize("reason", ["", "OTHER"])
def test_an_answer_that_no_page_declares(world: World, tmp_path: Path, code: str, reason: str) -> None:
    world.refuse("get", "p", code, reason)
    assert world.violations(tmp_path) == {UNDECLARED}


@pytest.mark.parametrize(("code", "reason"), [("INTERNAL", ""), ("UNKNOWN", ""), ("INTERNAL", "INTERNAL")])
def test_a_connection_that_broke_with_its_server(world: World, tmp_path: Path, code: str, reason: str) -> None:
    op = world.refuse("get", "p", code, reason)
    op.attempts[0].ended = world.now + 9.9  # the server's end is noted a moment later
    assert world.violations(tmp_path) == ({UNDECLARED} if reason else set())


@pytest.mark.parametrize(("answered", "found"), [(20, {"a server that refuses too much"}), (80, set())])
def test_a_server_that_refuses_everything(world: World, tmp_path: Path, answered: int, found: set[str]) -> None:
    for count in range(120):
        world.refuse("get", "p", "UNAVAILABLE", "DRAINING", tenant=("red", "blue")[count % 2])
    for _ in range(answered):
        world.do("logprob", "p", rows=[0])
    assert world.violations(tmp_path) == found


def test_a_server_that_refuses_one_thing_always(world: World, tmp_path: Path) -> None:
    for _ in range(100):
        world.refuse("save", "p", "UNAVAILABLE", "DRAINING")
        world.do("get", "p")
    assert world.violations(tmp_path) == {"a server that refuses too much"}
