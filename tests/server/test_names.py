from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.server.errors import InvalidArgument
from onebase.server.names import check_name, check_new_name, hint, problem

FIRST = string.ascii_letters + string.digits
REST = FIRST + "._-"

good = st.builds(lambda first, rest: first + rest, st.sampled_from(FIRST), st.text(REST, max_size=63))


@given(good)
def test_every_name_of_the_contract_is_taken(name):
    assert problem(name) is None
    check_name(name, "name")


@given(st.text())
def test_whatever_else_is_refused(name):
    fine = 1 <= len(name) <= 64 and name[0] in FIRST and set(name) <= set(REST)
    assert (problem(name) is None) == fine


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/b", ".x", "-x", "_x", "a\0b", "a\n", "a b", "é", "а", "x" * 65, "p1\u200b", "١"],
)
def test_tricks_are_refused_with_the_field(name):
    with pytest.raises(InvalidArgument) as caught:
        check_name(name, "rewards[2].adapter")
    assert caught.value.field == "rewards[2].adapter"
    assert caught.value.reason == "BAD_ADAPTER_NAME"


def test_the_base_is_no_new_name_but_near_ones_are():
    with pytest.raises(InvalidArgument, match="reserved"):
        check_new_name("base", "name")
    for name in ("Base", "base1", "the-base"):
        check_new_name(name, "name")


def test_a_long_name_is_not_echoed_whole():
    with pytest.raises(InvalidArgument) as caught:
        check_name("x" * 10**6, "name")
    assert len(caught.value.message) < 300


def test_near_names_are_named_first_and_many_are_cut_short():
    assert hint("polcy_1", ["policy_1", "reward"]) == "did you mean 'policy_1'?"
    assert hint("zzz", ["policy_1", "reward"]) == "there are policy_1, reward"
    assert hint("zzz", []) == "there are none"
    assert hint("zzz", [f"a{i:02}" for i in range(25)]).endswith("a19 and 5 more")
