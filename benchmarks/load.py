"""Whether a server holds under load, and whether one tenant can spoil it for the others: `make load`.

    python benchmarks/load.py [--minutes 10] [--flood-minutes 4]

Eight equal tenants with eight clients each, in processes of their own, do all that clients do (`load_clients.DECK`) on
a base with random weights (that of the tests: 23,200 parameters, so that the server's own work, and not arithmetic, is
what is under load). Each client calls again a moment after it has its answer, as programs do, so that the server is at
its limit throughout, and its queues are as long as there are clients. Half of the tenants have a session for each
client, the others one for all: nobody may get more by that. Then one tenant sends ten times as much as before,
whatever it is answered, in every other window of time.

Writes results/load.json and the section of README.md. The exit code is 1 where a bound is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="160")

import psutil
import report
import typer
from load_clients import Settings
from serving import END_SECONDS, environment, served

from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "oracle" / "fixtures"
TENANTS = [f"tenant-{number}" for number in range(1, 9)]
CLIENTS, PROCESSES = 8, 2
THINK = 0.1
FLOODER, TIMES = TENANTS[-1], 10
WINDOW, SETTLE = 20.0, 4.0
"""Seconds of a calm or flooded window, and of its beginning that does not count."""
PIECE = 30.0
"""Seconds over which the fairness is looked at piece by piece."""
WARM = 0.15
"""The part of the time after which memory is looked at, and calls count."""
FEWEST = 50
"""Calls of a method in calm, and in floods, without which its p95 says nothing."""
FEWEST_IN_PIECE = 100
"""Calls of a tenant in a piece of time without which its tokens say more of the draw than of the server."""
BOUNDS = {"errors": 0, "memory_growth": 0.05, "fairness": 0.95, "fairness_worst_piece": 0.95, "flood_p95": 2.0}


@dataclass(frozen=True)
class Call:
    """One line of the clients'."""

    at: float
    tenant: str
    method: str
    seconds: float
    tokens: int
    refusals: int
    error: str


@dataclass(frozen=True)
class Plan:
    """When what happens, on CLOCK_MONOTONIC."""

    begin: float
    steady: float
    windows: tuple[tuple[float, float], ...]
    """Calm and flooded ones by turns, the first is calm."""

    @property
    def floods(self) -> list[tuple[float, float]]:
        """The flooded windows."""
        return list(self.windows[1::2])

    @property
    def end(self) -> float:
        """Of all."""
        return self.windows[-1][1] if self.windows else self.begin + self.steady


def plan(begin: float, minutes: float, flood_minutes: float) -> Plan:
    """So many minutes of steady load, then so many of windows."""
    first, pairs = begin + 60 * minutes, round(60 * flood_minutes / WINDOW / 2)
    return Plan(begin, 60 * minutes, tuple((first + n * WINDOW, first + (n + 1) * WINDOW) for n in range(2 * pairs)))


# ------------------------------------------------------------------------------------------------ running


class Clients:
    """A process of clients.

    Args:
        folder: for its files.
        name: of these.
        settings: what it is told.
    """

    def __init__(self, folder: Path, name: str, settings: Settings) -> None:
        self._out = Path(settings.out)
        told = folder / f"{name}.json"
        told.write_text(json.dumps(asdict(settings)), encoding="utf-8")
        command = [sys.executable, str(HERE / "load_clients.py"), str(told)]
        self.process = subprocess.Popen(command, env=environment())

    def calls(self) -> list[Call]:
        """What it has recorded so far."""
        if not self._out.exists():
            return []
        lines = self._out.read_text(encoding="utf-8").splitlines()
        return [Call(*json.loads(line)) for line in lines if line.endswith("]")]

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS + 60)
        if self.process.poll() is None:
            self.process.kill()
        if self.process.wait():
            raise RuntimeError(f"a process of clients ended with {self.process.returncode}")


@dataclass(frozen=True)
class Found:
    """What was recorded."""

    plan: Plan
    calls: list[Call]
    flood: list[Call]
    rate: float
    memory: list[tuple[float, int]]
    """When, and resident bytes of the server."""
    cpu: float
    """The server's, in seconds per second of the steady part."""


def measure(folder: Path, minutes: float, flood_minutes: float, seed: int) -> Found:
    """Runs it all."""
    tokens = TokenFile(folder / "tokens.json")
    keys = {tenant: tokens.add(tenant, tuple(Scope), (), None) for tenant in TENANTS}
    flags = ("--reward", f"r={FIXTURES / 'reward'}", "--tokens", str(folder / "tokens.json"))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(FIXTURES / "base", *flags, "--state", str(folder / "state")))
        when = plan(time.monotonic() + 20.0, minutes, flood_minutes)

        def settings(name: str, tenants: Sequence[str], **more: Any) -> Settings:
            common = {
                "address": server.address,
                "clients": CLIENTS,
                "sessions": TENANTS[::2],
                "think": THINK,
                "seed": seed,
            }
            return Settings(
                **{**common, "begin": when.begin, "end": when.end, **more},
                tokens={tenant: keys[tenant] for tenant in tenants},
                out=str(folder / f"{name}.jsonl"),
            )

        pauses = [(FLOODER, begin, until) for begin, until in when.floods]
        processes = []
        for number in range(PROCESSES):
            told = settings(f"clients{number}", TENANTS[number::PROCESSES], pauses=pauses)
            processes.append(Clients(folder, f"clients{number}", told))
        memory: list[tuple[float, int]] = []
        watched = psutil.Process(server.pid)
        _watch(watched, memory, when.begin)
        before = server.cpu_seconds()
        _watch(watched, memory, when.begin + when.steady)
        cpu = (server.cpu_seconds() - before) / when.steady
        calm = [call for process in processes for call in process.calls() if call.tenant == FLOODER]
        operations = sum(call.method not in ("OptimStep", "DeleteAdapter", "CloseSession") for call in calm)
        rate = TIMES * operations / when.steady
        flood = None
        if when.floods:
            flooder = settings("flood", [FLOODER], flood=when.floods, rate=rate, sessions=[])
            flood = Clients(folder, "flood", flooder)
        _watch(watched, memory, when.end)
        for process in [*processes, *([flood] if flood else [])]:
            process.close()
        calls = [call for process in processes for call in process.calls()]
        return Found(when, calls, flood.calls() if flood else [], rate, memory, cpu)


def _watch(process: psutil.Process, memory: list[tuple[float, int]], until: float) -> None:
    """Notes the memory until then."""
    while time.monotonic() < until:
        memory.append((time.monotonic(), process.memory_info().rss))
        time.sleep(min(2.0, max(0.0, until - time.monotonic())))


# ------------------------------------------------------------------------------------------------ numbers


def jain(amounts: Sequence[float]) -> float:
    """Jain's fairness index: 1 where all have the same, 1/n where one has everything (Jain, Chiu, Hawe 1984)."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount**2 for amount in amounts) or 1)


def growth(memory: Sequence[tuple[float, int]]) -> float:
    """By how much memory grew over the time, as a part of its median: by Theil and Sen's slope, the pairs' median."""
    slopes = [(b - a) / (later - earlier) for n, (earlier, a) in enumerate(memory) for later, b in memory[n + 1 :]]
    median = statistics.median(held for _, held in memory)
    return statistics.median(slopes) * (memory[-1][0] - memory[0][0]) / median


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds, and how many there were."""
    ordered = sorted(seconds)
    at = {
        f"p{part}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * part // 100)], 1)
        for part in (50, 95, 99)
    }
    return {"calls": len(ordered), **at}


def by_method(calls: Sequence[Call]) -> dict[str, list[float]]:
    """Seconds of the calls that were answered."""
    found: dict[str, list[float]] = defaultdict(list)
    for call in calls:
        if not call.error:
            found[call.method].append(call.seconds)
    return dict(sorted(found.items()))


def fairness(calls: Sequence[Call]) -> float:
    """Jain's index of the tokens that tenants were served."""
    served_tokens = Counter(dict.fromkeys(TENANTS, 0))
    for call in calls:
        served_tokens[call.tenant] += call.tokens
    return jain([served_tokens[tenant] for tenant in TENANTS])


def steady(found: Found) -> dict[str, Any]:
    """Of the time without a flood."""
    begin, end = found.plan.begin + WARM * found.plan.steady, found.plan.begin + found.plan.steady
    calls = [call for call in found.calls if begin <= call.at < end]
    pieces = []
    while begin + PIECE * len(pieces) + PIECE <= end:
        first = begin + PIECE * len(pieces)
        pieces.append(fairness([call for call in calls if first <= call.at < first + PIECE]))
    memory = [(at, held) for at, held in found.memory if begin <= at < end]
    return {
        "minutes": round(found.plan.steady / 60, 2),
        "calls_per_second": round(len(calls) / (end - begin), 1),
        "tokens_per_second": round(sum(call.tokens for call in calls) / (end - begin)),
        "server_cpu": round(found.cpu, 2),
        "refusals": sum(call.refusals for call in found.calls if call.at < end),
        "memory_mib": [round(held / 2**20) for held in (memory[0][1], memory[-1][1])],
        "memory_growth": round(growth(memory), 4),
        "fairness": round(fairness(calls), 4),
        "fairness_pieces": [round(piece, 4) for piece in pieces],
        "calls_of_a_tenant_in_a_piece": round(len(calls) / (end - begin) * PIECE / len(TENANTS)),
        "latency": {name: quantiles(seconds) for name, seconds in by_method(calls).items()},
    }


def flooded(found: Found) -> dict[str, Any]:
    """Of the windows: what the others waited with the flood and without."""
    sides: dict[bool, list[Call]] = {False: [], True: []}
    for number, (begin, until) in enumerate(found.plan.windows):
        kept = (call for call in found.calls if begin + SETTLE <= call.at < until and call.tenant != FLOODER)
        sides[bool(number % 2)] += kept
    calm, flood = by_method(sides[False]), by_method(sides[True])
    methods = {}
    for name in sorted(calm.keys() & flood.keys()):
        one, other = quantiles(calm[name]), quantiles(flood[name])
        enough = min(one["calls"], other["calls"]) >= FEWEST
        ratio = round(other["p95_ms"] / max(one["p95_ms"], 1e-3), 2)
        methods[name] = {"calm": one, "flood": other, "p95_ratio": ratio, "counts": enough}
    outcomes = Counter(call.error.partition(":")[0] or "answered" for call in found.flood)
    seconds = sum(until - begin for begin, until in found.plan.floods)
    return {
        "rate_per_second": round(found.rate, 1),
        "sent_per_second": round(len(found.flood) / seconds, 1),
        "outcomes": dict(outcomes),
        "windows": len(found.plan.windows),
        "refusals_of_others": sum(call.refusals for call in sides[True]),
        "others": methods,
        "p95_ratio_of_all": round(
            quantiles([s for one in flood.values() for s in one])["p95_ms"]
            / quantiles([s for one in calm.values() for s in one])["p95_ms"],
            2,
        ),
    }


def judged(found: Found, of_steady: dict[str, Any], of_flood: dict[str, Any] | None) -> dict[str, Any]:
    """Each bound, what was seen, and whether it is met."""
    errors = Counter(f"{call.method}: {call.error}" for call in found.calls if call.error)
    seen: dict[str, float] = {
        "errors": errors.total(),
        "memory_growth": of_steady["memory_growth"],
        "fairness": of_steady["fairness"],
    }
    if of_steady["fairness_pieces"] and of_steady["calls_of_a_tenant_in_a_piece"] >= FEWEST_IN_PIECE:
        seen["fairness_worst_piece"] = min(of_steady["fairness_pieces"])
    bounds = {}
    if of_flood is not None:
        counted = {name: one["p95_ratio"] for name, one in of_flood["others"].items() if one["counts"]}
        seen["flood_p95"] = max(counted.values(), default=of_flood["p95_ratio_of_all"])
    for name, value in seen.items():
        met = value >= BOUNDS[name] if name.startswith("fairness") else value <= BOUNDS[name]
        bounds[name] = {"value": value, "bound": BOUNDS[name], "met": met}
    if of_flood is not None:
        refused = of_flood["outcomes"].get("refused", 0)
        bounds["flood_refused"] = {"value": refused, "bound": 1, "met": refused >= 1}
    if errors:
        bounds["errors"]["which"] = dict(errors.most_common(10))
    return bounds


# ------------------------------------------------------------------------------------------------ writing


def section(found: dict[str, Any]) -> str:
    """The part of README.md."""
    one, where, bounds = found["steady"], found["machine"], found["bounds"]
    lines = [
        f"{len(TENANTS) * CLIENTS} clients of {len(TENANTS)} tenants, {one['minutes']:g} minutes, a base of 23,200 "
        f"parameters; {where['cpu']}, {where['cores']} cores, load {where['load_before']} before it began. "
        f"{one['calls_per_second']:g} calls and {one['tokens_per_second']:,} tokens a second; the server used "
        f"{one['server_cpu']:g} of a core and held {one['memory_mib'][0]} MiB, {one['memory_mib'][1]} at the end.",
        "",
        "| bound | seen | at most / at least | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {b['value']:g} | {b['bound']:g} | {'✓' if b['met'] else '✗'} |" for name, b in bounds.items()
    ]
    flood = found.get("flood")
    head = "| method | calls | p50 | p95 | p99 |" + (" p95 calm | p95 flooded | ratio |" if flood else "")
    lines += ["", "Milliseconds, seen by the client:", "", head, "|---" * (head.count("|") - 1) + "|"]
    for name, at in one["latency"].items():
        row = f"| {name} | {at['calls']} | {at['p50_ms']:g} | {at['p95_ms']:g} | {at['p99_ms']:g} |"
        other = flood and flood["others"].get(name)
        if other:
            ratio = f"{other['p95_ratio']:g}" + ("" if other["counts"] else " (few)")
            row += f" {other['calm']['p95_ms']:g} | {other['flood']['p95_ms']:g} | {ratio} |"
        elif flood:
            row += " | | |"
        lines.append(row)
    if flood:
        told = ", ".join(f"{count:,} {what}" for what, count in sorted(flood["outcomes"].items()))
        lines += ["", f"The flood: {flood['rate_per_second']:g} calls a second, ten times that tenant's usual; {told}."]
    return "\n".join(lines)


BEGIN, END = "<!-- written by make load -->", "<!-- end of what make load wrote -->"


def write(found: dict[str, Any], out: Path) -> None:
    """The JSON, and the section of README.md where that is the one beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    if rest and out.parent == HERE / "results":
        whole = f"{before}{BEGIN}\n\n{section(found)}\n\n{END}{rest.partition(END)[2]}"
        readme.write_text(whole, encoding="utf-8")


@contextlib.contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


Minutes = Annotated[float, typer.Option(min=0.5, envvar="LOAD_MINUTES", help="Of the load without a flood.")]
FloodMinutes = Annotated[float, typer.Option(min=0.0, help="Of calm and flooded windows by turns.")]
Out = Annotated[Path, typer.Option(help="Where to write.")]
Keep = Annotated[Path | None, typer.Option(help="A directory for what is recorded; it stays.")]


def main(
    minutes: Minutes = 10.0,
    flood_minutes: FloodMinutes = 4,
    seed: int = 0,
    out: Out = HERE / "results" / "load.json",
    keep: Keep = None,
) -> None:
    """Measure, write, and say which bounds hold."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server goes too
    found: dict[str, Any] = {"machine": report.machine(), "versions": report.versions()}
    with _place(keep) as folder:
        seen = measure(folder, minutes, flood_minutes, seed)
    found["steady"] = steady(seen)
    if seen.plan.windows:
        found["flood"] = flooded(seen)
    found["bounds"] = judged(seen, found["steady"], found.get("flood"))
    write(found, out)
    print(section(found))
    raise typer.Exit(0 if all(bound["met"] for bound in found["bounds"].values()) else 1)


if __name__ == "__main__":
    typer.run(main)
