"""The verdict on a run under load, on records that are made here: what it must see, and what it must let pass."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import load_verdict as verdict
import pytest
from load_clients import DECK, REFUSED, UNFINISHED
from load_verdict import FLOODER, METHODS, POOLED, SETTLE, TENANTS, Call, Found, plan

PLAN = plan(0.0, 10, 5)
OTHERS = TENANTS[:-1]
MEMORY = [(float(second), 500 << 20) for second in range(0, 920, 2)]
SECONDS = {"CreateAdapter": 0.3, "Generate": 2.4}


def every(step: float, begin: float, until: float) -> Iterable[float]:
    """Times between these, so many seconds apart."""
    return (begin + step * number for number in range(round((until - begin) / step)))


def call(began: float, method: str, seconds: float | None = None, tenant: str = OTHERS[0], **more: Any) -> Call:
    """A call that began then."""
    seconds = SECONDS.get(method, 0.1) if seconds is None else seconds
    return Call(began + seconds, tenant, method, seconds, **{"tokens": 0, "refusals": 0, "error": "", **more})


@functools.cache
def good() -> Found:
    """A run in which the flood costs nobody anything: frequent methods each half second, rare ones each four."""
    calls = [call(at, "Logprob", tenant=one, tokens=100) for one in TENANTS for at in every(0.25, 0, PLAN.begin + 600)]
    for begin, until in PLAN.windows:
        for method in METHODS:
            step = 4.0 if method in POOLED else 0.5
            calls += [call(at, method, tenant=one) for one in OTHERS[:2] for at in every(step, begin, until)]
    flood = [call(at, "Score", tenant=FLOODER) for begin, until in PLAN.floods for at in every(0.2, begin, until)]
    flood += [call(at, "Score", error=REFUSED) for begin, until in PLAN.floods for at in every(0.022, begin, until)]
    return Found(PLAN, calls, flood, 50.0, MEMORY, 0.9)


def bounds(found: Found) -> dict[str, Any]:
    """What is said of these records."""
    flood = verdict.flooded(found) if found.plan.windows else None
    return verdict.judged(found, verdict.steady(found), flood)


def broken(found: Found) -> list[str]:
    """The bounds that are not met."""
    return [name for name, one in bounds(found).items() if not one["met"]]


def in_flood(one: Call) -> bool:
    return any(begin <= one.began < until for begin, until in PLAN.floods)


def test_a_good_run_breaks_no_bound_and_all_are_judged() -> None:
    assert broken(good()) == []
    assert set(bounds(good())) == {*verdict.AT_MOST, *verdict.AT_LEAST}


def test_every_method_of_the_deck_is_to_be_judged() -> None:
    assert len(METHODS) == len(DECK) + len(verdict.PARTS)
    assert set(POOLED) < set(METHODS)


# ------------------------------------------------------------------------------------------------ starvation


@pytest.mark.parametrize("method", ["ForwardBackward", "KeepAlive"])
def test_calls_that_a_flood_holds_back_to_its_end_and_beyond_are_the_floods(method: str) -> None:
    def held(one: Call) -> Call:
        ended = next(until for begin, until in PLAN.floods if begin <= one.began < until) + 1.0
        return replace(one, at=ended, seconds=ended - one.began)

    found = good()
    calls = [held(one) if one.method == method and in_flood(one) else one for one in found.calls]
    assert broken(replace(found, calls=calls)) == ["flood_p95"]


def test_clients_that_wait_from_the_floods_first_moment_to_its_last_are_seen() -> None:
    """Each has one call open, which began just before the flood, and no time for another."""
    found = good()
    calls = [one for one in found.calls if not in_flood(one)]
    for begin, until in PLAN.floods:
        for method in METHODS:
            calls += [call(begin - 0.05, method, until - begin + 1.0, tenant=one) for one in OTHERS]
    assert "flood_p95" in broken(replace(found, calls=calls))


def test_calls_that_never_end_count_with_the_time_until_nobody_waited_any_more() -> None:
    found = good()

    def open_at_the_end(one: Call) -> Call:
        hangs = one.method == "Score" and PLAN.floods[-1][0] <= one.began
        return replace(one, at=PLAN.end + 30, seconds=PLAN.end + 30 - one.began, error=UNFINISHED) if hangs else one

    verdict_on = bounds(replace(found, calls=[open_at_the_end(one) for one in found.calls]))
    assert not verdict_on["errors"]["met"]
    assert verdict_on["flood_p95"]["which"] == "Score"
    assert verdict_on["flood_p95"]["value"] > 100


def test_what_the_flood_leaves_behind_is_no_part_of_calm() -> None:
    """Slow calls at the beginning of calm would make the flood look cheap."""
    found = good()
    slow = [
        replace(one, at=one.at + 3.0, seconds=one.seconds + 3.0)
        if any(begin <= one.began < begin + SETTLE for begin, _ in PLAN.calms)
        else one
        for one in found.calls
    ]
    calm, _ = verdict.in_calm_and_flood(replace(found, calls=slow))
    assert max(one.seconds for one in calm) == max(SECONDS.values())


def test_a_flood_that_costs_less_than_twice_is_let_pass_and_more_is_not() -> None:
    found = good()
    for times, names in ((1.8, []), (2.2, ["flood_p95"])):
        longer = [
            replace(one, at=one.began + times * one.seconds, seconds=times * one.seconds) if in_flood(one) else one
            for one in found.calls
        ]
        assert broken(replace(found, calls=longer)) == names


# ------------------------------------------------------------------------------------------------ what is not judged


def test_a_method_that_is_missing_on_one_side_is_said_to_be() -> None:
    found = good()
    calls = [one for one in found.calls if not (one.method == "OptimStep" and in_flood(one))]
    verdict_on = bounds(replace(found, calls=calls))
    assert verdict_on["flood_uncounted"] == {"value": 1, "bound": 0, "met": False, "which": ["OptimStep"]}


def test_a_method_that_is_called_too_seldom_is_said_to_be() -> None:
    found = good()
    seldom = [one for one in found.calls if one.method == "GetStatus"][:: len(PLAN.windows)]
    calls = [one for one in found.calls if one.method != "GetStatus"] + seldom
    assert bounds(replace(found, calls=calls))["flood_uncounted"]["which"] == ["GetStatus"]


def test_one_of_the_rare_methods_that_hardly_comes_is_said_to_be() -> None:
    found = good()
    calls = [one for one in found.calls if not (one.method == "OpenSession" and in_flood(one) and one.began > 630)]
    assert bounds(replace(found, calls=calls))["flood_uncounted"]["which"] == ["OpenSession"]


def test_pieces_with_too_few_calls_are_not_passed_over_in_silence() -> None:
    found = good()
    calls = [one for one in found.calls if one.began >= 600 or one.began % 1 == 0]
    worst = bounds(replace(found, calls=calls))["fairness_worst_piece"]
    assert (worst["value"], worst["met"]) == (None, False)
    assert "30 calls" in worst["which"]


# ------------------------------------------------------------------------------------------------ the flood itself


def test_errors_of_the_flood_are_seen_and_named() -> None:
    found = good()
    flood = [*found.flood, call(650.0, "Score", tenant=FLOODER, error="INTERNAL: internal error 12")]
    assert broken(replace(found, flood=flood)) == ["flood_errors"]
    assert bounds(replace(found, flood=flood))["flood_errors"]["which"] == {"INTERNAL: internal error 12": 1}


def test_what_the_flood_leaves_open_was_sent_and_is_no_error() -> None:
    found = good()
    flood = [replace(one, error=UNFINISHED) if not one.error else one for one in found.flood]
    assert broken(replace(found, flood=flood)) == []


def test_a_flood_that_was_not_sent_is_none() -> None:
    found = good()
    assert broken(replace(found, flood=found.flood[::2])) == ["flood_sent"]
    assert broken(replace(found, flood=[])) == ["flood_sent", "flood_refused"]


def test_a_flood_that_has_others_refused_is_seen() -> None:
    found = good()
    first = next(number for number, one in enumerate(found.calls) if in_flood(one) and one.method == "Reward")
    calls = [*found.calls[:first], replace(found.calls[first], refusals=1), *found.calls[first + 1 :]]
    assert broken(replace(found, calls=calls)) == ["refusals_of_others"]


def test_a_short_flood_is_one_all_the_same() -> None:
    assert len(plan(0.0, 1, 0.1).windows) == 2
    assert plan(0.0, 1, 0).windows == ()
