"""What `make faults` found: `tests/faults/results.json` for programs, `docs/reliability.md` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faults.rows import ROWS

from onebase.server import failpoints

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "faults" / "results.json"
PAGE = ROOT / "docs" / "reliability.md"

HISTORY = "python -m history.run --kills {kills} --seed {seed} --out history.json"
FUZZ = "python -m fuzz.run --inputs {inputs} --seed {seed} --out fuzz.json"

Results = Mapping[str, Any]


def fault(row: int, count: Mapping[str, Any]) -> dict[str, Any]:
    """What the record says of a row, of what `faults.plugin` has counted."""
    seen = ", ".join(count["told"]) if ROWS[row].told else "nothing: the client is gone"
    return {**count, "seen": seen}


def wrong(results: Results) -> list[str]:
    """What does not hold, a line each; what was not tried does not hold."""
    lines = []
    for row in ROWS:
        one = results["faults"].get(str(row), {"tried": 0, "held": 0})
        if not one["tried"] or one["held"] != one["tried"]:
            tests = ", ".join(one.get("failed", ())) or "it has no test that could be run"
            lines.append(f"fault {row} ({ROWS[row].fault}) held {one['held']} times of {one['tried']}: {tests}")
    training, history, fuzz = results["training"], results["history"], results["fuzz"]
    if results["tests"]["exit_code"]:  # also of one whose process died, and which so was in no row
        lines.append(f"the tests of the faults ended with {results['tests']['exit_code']}")
    if training["held"] != training["tried"] or set(training["places"]) != set(failpoints.PLACES):
        lines.append(f"training: {training}")
    if history["kills"] < history["wanted"] or history["violations"] or history["exit_code"]:
        lines.append(f"history: {history}")
    if fuzz["inputs"] < fuzz["wanted"] or fuzz["crashes"] or fuzz["exit_code"]:
        lines.append(f"fuzz: {fuzz}")
    return lines


def read() -> Results:
    """The record that is committed."""
    found: Results = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def write(results: Results) -> None:
    """Writes both files."""
    RECORD.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """The page for people."""
    history, fuzz, training = results["history"], results["fuzz"], results["training"]
    skipped = results["tests"]["skipped"]
    counts = [results["faults"][str(row)] for row in ROWS]
    places = ", ".join(f"`{place}` {number}" for place, number in training["places"].items())
    return PAGE_TEXT.format(
        rows="\n".join(_row(row, one) for row, one in zip(ROWS.items(), counts, strict=True)),
        faults=len(ROWS),
        tried=sum(one["tried"] for one in counts),
        held=sum(one["held"] for one in counts),
        kills=training["kills"],
        places=places,
        identical="bit-identical" if training["held"] == training["tried"] else "**not** bit-identical",
        skipped=f" Not tried there: {', '.join(f'`{test}`' for test in skipped)}." if skipped else "",
        history=history,
        history_command=HISTORY.format(kills=history["kills"], seed=history["seed"]),
        fuzz=fuzz,
        fuzz_command=FUZZ.format(inputs=fuzz["inputs"], seed=fuzz["seed"]),
        run=results["run"],
        commits=_commits(results["run"]["commits"]),
        minutes=results["run"]["seconds"] / 60,
    )


def _commits(commits: Mapping[str, str]) -> str:
    """Which commits were tried: one, unless a part was made anew alone."""
    if len(set(commits.values())) == 1:
        return f"commit {commits['faults']}"
    return "the faults at commit {faults}, the history at {history}, the fuzzers at {fuzz}".format(**commits)


def _row(row: tuple[int, Any], one: Mapping[str, Any]) -> str:
    number, it = row
    seen = ", ".join(f"`{told}`" for told in one["told"]) or one["seen"]
    tests = f"{one['held']} of {one['tried']}"
    return f"| {number} | {it.fault} | {it.made} | {tests} | {seen} | {it.promise} | {it.lost} |"


PAGE_TEXT = """\
# Reliability

Every step that was answered is durable; a run that was killed ends bit-identical to one that was not; no tenant can
see, change or starve another. That is promised of a server with `--state`, `--durability step` and `--tokens`
([durability](durability.md), [security](security.md)), and this page says how it was tried. `make faults` makes it,
with [tests/faults/results.json](../tests/faults/results.json) for programs, and fails if anything did not hold.

## Faults

{faults} faults, each made for real: processes killed and frozen, networks that swallow packets, full disks, broken
files and bytes, seen through a plain gRPC client that repeats nothing. {tried} tries, {held} of which held: the client
was told what the table promises, and everything else was as it should be.{skipped}

An error carries one `google.rpc.ErrorInfo` (a reason in capitals, domain `onebase`), `BadRequest` with the field that
is to blame, and `RetryInfo` where waiting helps. What the transport refuses by itself, a connection that is cut, and
what gRPC's own deadline or cancel ends have a code and no reason.

| # | fault | what is done | held | what the client saw | what holds then | what was lost |
|---|---|---|---|---|---|---|
{rows}

## A training that is killed

Two PPO runs, each a process of its own, train on one server with `--durability step`. The server is killed with kill -9
{kills} times, at every failpoint there is ({places}), in the first step and in later ones, and
started again; the trainers reconnect by themselves. Weights, moments of AdamW, and the statistics of every step are
{identical} to those of a run that nobody disturbed.

## A random history

Eight clients do random things while the server is killed at random; afterwards every operation that was answered is
compared with a model of the system, and every one that was not must have happened once or not at all.

| kills | operations sent | answered, and checked | violations | seed |
|---|---|---|---|---|
| {history[kills]} | {history[sent]} | {history[operations]} | {history[violations]} | {history[seed]} |

`PYTHONPATH=tests {history_command}` replays it.

## Fuzzers

Random messages and random safetensors files, made of valid ones: {fuzz[inputs]} inputs, {fuzz[crashes]} crashes, hangs
or unexplained `INTERNAL`. `PYTHONPATH=tests {fuzz_command}` runs them again.

## Where

{run[date]}, {commits}, {run[machine]}, in {minutes:.0f} minutes; {run[versions]}.
"""
