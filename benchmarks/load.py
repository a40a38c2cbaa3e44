"""Whether a server holds under load, and whether one tenant can spoil it for the others: `make load`.

    python benchmarks/load.py [--minutes 10] [--flood-minutes 5]

Eight equal tenants with eight clients each, in processes of their own, do all that clients do (`load_clients.DECK`) on
a base with random weights (that of the tests: 23,200 parameters, so that the server's own work, and not arithmetic, is
what is under load). Each client calls again a moment after it has its answer, as programs do, so that the server is at
its limit throughout, and its queues are as long as there are clients. Half of the tenants have a session for each
client, the others one for all: nobody may get more by that. Then one tenant sends ten times as much as before,
whatever it is answered, in every other window of time. `load_verdict` says what is made of the records.

Writes results/load.json and the section of README.md. The exit code is 1 where a bound is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="160")

import psutil
import report
import typer
from load_clients import Settings
from load_verdict import FLOODER, TENANTS, TIMES, Call, Found, flooded, judged, plan, steady
from serving import END_SECONDS, environment, served

from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "tests" / "oracle" / "fixtures"
CLIENTS, PROCESSES = 8, 2
THINK = 0.1


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
        f"| {name} | {_number(b['value'])} | {b['bound']:g} | {'✓' if b['met'] else '✗'} |"
        for name, b in bounds.items()
    ]
    flood = found.get("flood")
    head = "| method | calls | p50 | p95 | p99 |" + (" p95 calm | p95 flooded | ratio |" if flood else "")
    lines += ["", "Milliseconds, seen by the client:", "", head, "|---" * (head.count("|") - 1) + "|"]
    for name, at in one["latency"].items():
        row = f"| {name} | {at['calls']} | {at['p50_ms']:g} | {at['p95_ms']:g} | {at['p99_ms']:g} |"
        if flood:
            row += _of_flood(flood, name)
        lines.append(row)
    if flood:
        pool = flood["pooled"]
        told = ", ".join(f"{count:,} {what}" for what, count in sorted(flood["outcomes"].items()))
        lines += [
            "",
            "Rare methods are judged together, each call in medians of its own method in calm: at the p95 "
            f"{_number(pool['p95_ratio'])} times as long, of {pool['calls'][0]} calls in calm and {pool['calls'][1]} "
            "in floods.",
            "",
            f"The flood: {flood['rate_per_second']:g} calls a second, ten times that tenant's usual; {told}.",
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not judged" if value is None else f"{value:g}"


def _of_flood(flood: dict[str, Any], name: str) -> str:
    """What the row of a method says of the flood."""
    other = flood["others"][name]
    how = "" if other["counts"] else " (too few)" if name in flood["uncounted"] else " (with others)"
    ends = (_number(other[side].get("p95_ms")) for side in ("calm", "flood"))
    return f" {' | '.join(ends)} | {_number(other['p95_ratio'])}{how} |"


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


Minutes = Annotated[float, typer.Option(min=1.0, envvar="LOAD_MINUTES", help="Of the load without a flood.")]
FloodMinutes = Annotated[float, typer.Option(min=0.0, help="Of calm and flooded windows by turns.")]
Out = Annotated[Path, typer.Option(help="Where to write.")]
Keep = Annotated[Path | None, typer.Option(help="A directory for what is recorded; it stays.")]


def main(
    minutes: Minutes = 10.0,
    flood_minutes: FloodMinutes = 5.0,
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
