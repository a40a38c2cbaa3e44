"""The state that a soak begins with is full, and a store like any other."""

from __future__ import annotations

from pathlib import Path

from soak.full import ANSWER_BYTES, fill
from soak.watch import Watch

from onebase.server.store import MAX_ENDS, MAX_RESPONSES, EndRow, ResponseRow, Store
from onebase.v1 import training_pb2

TENANTS = ("red", "blue")


def rows(state: Path) -> dict[str, int]:
    return Watch(0, state, lambda: None)._rows()


def test_each_tenant_has_all_that_it_may_have_and_what_is_new_pushes_the_oldest_out(tmp_path: Path) -> None:
    fill(tmp_path / "state", TENANTS)
    full = rows(tmp_path / "state")
    assert (full["rows_responses"], full["most_responses"]) == (2 * MAX_RESPONSES, MAX_RESPONSES)
    assert (full["rows_ends"], full["most_ends"]) == (2 * MAX_ENDS, MAX_ENDS)
    store = Store(tmp_path / "state" / "registry.sqlite")
    first = store.responses()[0]
    store.answer(ResponseRow("s", "red/OptimStep", "new", b"", b""))
    store.remove(EndRow("red/new", "red", 1))
    assert rows(tmp_path / "state") == full
    kept = store.responses()
    assert first not in kept
    assert kept[-1].request == "new"
    store.close()


def test_its_answers_are_answers_of_the_size_that_trainers_get(tmp_path: Path) -> None:
    fill(tmp_path / "state", ("red",))
    store = Store(tmp_path / "state" / "registry.sqlite")
    answers = store.responses()
    store.close()
    assert len({(one.session, one.method, one.request) for one in answers}) == MAX_RESPONSES
    assert {len(one.response) for one in answers} == {ANSWER_BYTES}
    assert training_pb2.OptimStepResponse.FromString(answers[0].response).gradients_applied == 1
