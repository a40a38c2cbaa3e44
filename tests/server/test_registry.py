from __future__ import annotations

from dataclasses import replace

import pytest

from onebase.server.errors import Aborted, AlreadyExists, InvalidArgument, NotFound
from onebase.server.jobs import AdapterFacts, AdapterKind, AdapterMemory, LoraSpec
from onebase.server.registry import Registry


def facts(uid, kind=AdapterKind.POLICY, version=0):
    return AdapterFacts(uid, kind, version, LoraSpec(), False, 0, 10, AdapterMemory(), 0)


def add(registry, name, kind=AdapterKind.POLICY, version=0, replacing=False):
    reservation = registry.reserve(name, replacing=replacing)
    return registry.bind(reservation, facts(reservation.uid, kind, version), "")


def test_uids_are_never_used_twice():
    registry = Registry()
    uids = []
    for _ in range(3):
        uids.append(add(registry, "a").uid)
        registry.remove("a")
        reservation = registry.reserve("b")
        uids.append(reservation.uid)
        registry.release(reservation)
    assert uids == [1, 2, 3, 4, 5, 6]


def test_a_version_of_a_name_is_never_given_twice(monkeypatch):
    registry = Registry()
    assert registry.reserve("b").least_version == 0
    add(registry, "a", version=4)
    registry.remove("a")
    assert registry.least_version("a") == 5
    add(registry, "a", version=5)
    registry.update(facts(registry.get("a", "name").uid, version=7))
    assert registry.reserve("a", replacing=True).least_version == 8
    registry.end("a", 3)  # an older word of it
    registry.remove("a")
    assert registry.least_version("a") == 8
    assert registry.least_version("red/a") == 0  # another tenant's
    monkeypatch.setattr("onebase.server.registry.MAX_ENDS", 2)
    registry.end("red/x", 3)
    for name in "cd":
        registry.end(name, 2)
    assert [registry.least_version(key) for key in ("a", "c", "d", "red/x")] == [0, 2, 2, 3]


def test_a_name_is_taken_from_its_reservation_on_and_unknown_until_it_is_bound():
    registry = Registry(clock=lambda: 12.5)
    reservation = registry.reserve("a")
    with pytest.raises(AlreadyExists):
        registry.reserve("a")
    with pytest.raises(NotFound):
        registry.get("a", "adapter")
    entry = registry.bind(reservation, facts(reservation.uid), "/x")
    assert (entry.create_time, entry.source) == (12.5, "/x")
    assert registry.get("a", "adapter") is entry
    with pytest.raises(AlreadyExists):
        registry.reserve("a")


def test_a_released_name_is_free():
    registry = Registry()
    registry.release(registry.reserve("a"))
    add(registry, "a")


def test_a_replaced_name_means_the_old_one_until_it_is_bound_and_only_one_call_replaces_it():
    registry = Registry()
    old = add(registry, "a")
    reservation = registry.reserve("a", replacing=True)
    assert reservation.old is old
    assert registry.get("a", "adapter") is old
    with pytest.raises(Aborted):
        registry.reserve("a", replacing=True)
    with pytest.raises(AlreadyExists):
        registry.reserve("a")
    new = registry.bind(reservation, facts(reservation.uid), "")
    assert registry.get("a", "adapter") is new
    assert registry.current(old.uid) is None
    assert registry.current(new.uid) is new


def test_a_release_of_a_replacement_leaves_the_old_one():
    registry = Registry()
    old = add(registry, "a")
    registry.release(registry.reserve("a", replacing=True))
    assert registry.get("a", "adapter") is old


def test_facts_go_to_the_uid_they_speak_of_and_never_back_in_time():
    registry = Registry()
    one = add(registry, "a")
    registry.update(replace(one.facts, version=2))
    assert registry.get("a", "x").facts.version == 2
    registry.update(replace(one.facts, version=1))
    assert registry.get("a", "x").facts.version == 2
    registry.remove("a")
    two = add(registry, "a")
    registry.update(replace(one.facts, version=9))
    assert registry.get("a", "x") is two


def test_adapters_are_listed_by_name_and_kind():
    registry = Registry()
    for name, kind in (("b", AdapterKind.POLICY), ("c", AdapterKind.REWARD), ("a", AdapterKind.POLICY)):
        add(registry, name, kind)
    assert [entry.name for entry in registry.entries()] == ["a", "b", "c"]
    assert [entry.name for entry in registry.entries(AdapterKind.POLICY)] == ["a", "b"]


def test_an_unknown_name_is_told_with_near_ones_of_the_kind_that_was_wanted():
    registry = Registry()
    add(registry, "helpful", AdapterKind.REWARD)
    add(registry, "helpfl2", AdapterKind.POLICY)
    with pytest.raises(NotFound) as caught:
        registry.get("helpfl", "adapters[0]", AdapterKind.REWARD)
    assert caught.value.message == "there is no reward adapter 'helpfl': did you mean 'helpful'?"
    assert (caught.value.reason, caught.value.field) == ("ADAPTER_NOT_FOUND", "adapters[0]")
    with pytest.raises(InvalidArgument):
        registry.get("../helpful", "adapters[0]")
