from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from onebase.server.answers import Answers, Stored
from onebase.v1 import adapters_pb2

CAPACITY, BYTES = 4, 100


def whole(answers, key):
    """The answer, if its bytes are there."""
    found = answers.get(key)
    return None if found is None or found.data is None else found


def stored(size):
    return Stored(b"", adapters_pb2.SaveAdapterResponse, b"x" * size)


@given(st.lists(st.tuples(st.sampled_from(["", "red/", "blue/"]), st.integers(0, 9), st.integers(0, 60))))
def test_bounds_hold_and_who_has_little_loses_nothing(puts):
    answers, sizes = Answers(CAPACITY, BYTES), {}
    for tenant, number, size in puts:
        key = ("s", f"{tenant}M", f"r{number}")
        answers.put(key, stored(size))
        sizes[key] = max(size, sizes.get(key, 0))
    everything = {key: whole(answers, key) for key in sizes}
    for tenant in ("", "red/", "blue/"):
        put = [key for key in sizes if key[1] == f"{tenant}M"]
        kept = [everything[key] for key in put if everything[key] is not None]
        assert len(kept) <= CAPACITY
        assert bool(kept) == bool(put)
        if len(put) <= CAPACITY and sum(sizes[key] for key in put) <= BYTES // 3:
            assert len(kept) == len(put)
    kept = [len(one.data) for one in everything.values() if one is not None]
    assert sum(kept) <= BYTES + 60


def test_a_flood_of_one_tenant_pushes_out_no_other_tenants_answers():
    answers = Answers(CAPACITY, BYTES)
    answers.put(("s", "OptimStep", "r"), stored(10))
    answers.put(("s", "red/OptimStep", "r"), stored(10))
    for number in range(100):
        answers.put(("t", "blue/ForwardBackward", f"r{number}"), stored(90))
    assert answers.get(("s", "OptimStep", "r")) == answers.get(("s", "red/OptimStep", "r")) == stored(10)
    assert answers.get(("t", "blue/ForwardBackward", "r98")).data is None  # that it was done is known
    assert answers.get(("t", "blue/ForwardBackward", "r1")) is None


def test_an_answer_larger_than_all_of_the_room_is_kept_while_it_is_its_tenants_newest():
    answers = Answers(CAPACITY, BYTES)
    first, second, other = ("s", "red/M", "a"), ("s", "red/M", "b"), ("s", "M", "c")
    answers.put(first, stored(500))
    answers.put(other, stored(1))
    assert (answers.get(first), answers.get(other)) == (stored(500), stored(1))
    answers.put(second, stored(1))
    assert (whole(answers, first), answers.get(second), answers.get(other)) == (None, stored(1), stored(1))


def test_an_answer_put_again_counts_once():
    answers = Answers(CAPACITY, BYTES)
    for _ in range(50):
        answers.put(("s", "M", "a"), stored(40))
    answers.put(("s", "M", "b"), stored(60))
    assert answers.get(("s", "M", "a")) == stored(40)
