"""Mappings into dataclasses, flags into mappings."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from onebase.trainer.parsing import ConfigError, build, override, plain, require, split_arguments


@dataclass(frozen=True)
class Inner:
    number: float = 1.0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.number < 100, "number", f"{self.number} is not below 100")


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool = False
    kind: Literal["one", "two"] = "one"
    title: str = "t"
    limit: float | None = None
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()


def test_a_mapping_becomes_dataclasses_all_the_way_down():
    data = {
        "count": 3,
        "flag": True,
        "kind": "two",
        "limit": 2,
        "inner": {"number": 5, "names": ["a", "b"]},
        "many": [{"names": "one"}],
    }
    built = build(Outer, data)
    assert built == Outer(3, True, "two", "t", 2.0, Inner(5.0, ("a", "b")), (Inner(1.0, ("one",)),))
    assert type(built.limit) is float
    assert build(Outer, plain(built)) == built


@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "1e-04"])
def test_numbers_that_yaml_reads_as_text_are_numbers(text):
    assert build(Inner, {"number": text}).number == 1e-4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "count: is required"),
        ({"count": 1, "knd": "one"}, "knd: unknown key; did you mean 'kind'?"),
        ({"count": 1, "zzzzz": 1}, "zzzzz: unknown key; known are count, flag, kind"),
        ({"count": 1, "inner": {"numbr": 2}}, "inner.numbr: unknown key; did you mean 'number'?"),
        ({"count": 1, "many": [{}, {"number": 200}]}, "many.1.number: 200.0 is not below 100"),
        ({"count": 1, "inner": 3}, "inner: must be a mapping of settings, not 3"),
        ({"count": 1.5}, "count: must be a whole number, not 1.5"),
        ({"count": True}, "count: must be a whole number, not True"),
        ({"count": 1, "flag": 1}, "flag: must be true or false, not 1"),
        ({"count": 1, "kind": "three"}, "kind: 'three' is not one of one, two"),
        ({"count": 1, "title": 2024}, "title: must be text, not 2024; quote it"),
        ({"count": 1, "title": None}, "title: must be text, not nothing"),
        ({"count": 1, "limit": "much"}, "limit: must be a number, not 'much'"),
        ({"count": 1, "limit": True}, "limit: must be a number, not True"),
        ({"count": 1, "many": {}}, "many: must be a list, not {}"),
        ({"count": 1, "inner": {"names": 3}}, "inner.names: must be a list, not 3"),
        ([], "must be a mapping of settings, not []"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_dotted_name(data, message):
    with pytest.raises(ConfigError) as refused:
        build(Outer, data)
    assert str(refused.value).startswith(message)


def test_null_is_none_only_where_none_may_be():
    assert build(Outer, {"count": 1, "limit": None}).limit is None


def test_flags_take_the_next_word_or_what_follows_the_equals_sign():
    path, flags = split_arguments(["--a.b", "-1", "--c=--d", "file", "--e", "--f"])
    assert path == "file"
    assert flags == [("a.b", "-1"), ("c", "--d"), ("e", "--f")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["file", "--a"], "a: the flag needs a value; write --a VALUE"),
        (["--a", "1"], "no configuration is named"),
        (["file", "other"], "'file', 'other' cannot all be the one"),
        (["file", "steps=3"], "'file', 'steps=3' cannot all be the one; write CONFIG.yaml --KEY VALUE"),
    ],
)
def test_command_lines_without_one_file_and_whole_flags_are_refused(arguments, message):
    with pytest.raises(ConfigError) as refused:
        split_arguments(arguments)
    assert str(refused.value).startswith(message)


def test_overrides_reach_into_mappings_and_lists():
    data = {"many": [{"number": 1}, {"number": 2}], "inner": None}
    override(data, "many.1.number", 5)
    override(data, "inner.number", 6)
    override(data, "new.deep.key", 7)
    override(data, "many.0", {"number": 8})
    assert data == {"many": [{"number": 8}, {"number": 5}], "inner": {"number": 6}, "new": {"deep": {"key": 7}}}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("many.2.number", "many: is a list of 1; '2' is not one of its indexes"),
        ("many.first", "many: is a list of 1; 'first' is not one of its indexes"),
        ("count.deep", "count: is 3, so it has no key 'deep'"),
        ("count.deep.er", "count: is 3, so it has no key 'deep'"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(key, message):
    with pytest.raises(ConfigError) as refused:
        override({"many": [{}], "count": 3}, key, 1)
    assert str(refused.value) == message
