"""Hours in half of one: `make soak`, or `python -m soak.run` from `tests`.

One server with a state, which is as full at the beginning as weeks make it (`full`, `Load.fill`), tenants whose
trainers come and go, and samples of what it holds. Fails where something grows (see `slope`), where a tenant has more
rows than its bound, where something is left when everybody has gone, and where a client was told what no page declares.
Writes benchmarks/results/soak.json and soak.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from history.calls import Stubs
from oracle.fixtures import FIXTURES
from rich.console import Console
from soak.full import fill
from soak.load import Load
from soak.picture import draw
from soak.slope import Slope, slope
from soak.watch import Samples, Watch
from support import start_server

from onebase.server.identity import Scope
from onebase.server.store import MAX_ENDS, MAX_RESPONSES
from onebase.server.tokens import TokenFile
from onebase.v1 import server_pb2, server_pb2_grpc

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TENANTS = ("red", "blue", "green", "grey")
MIB = 2.0**20
LIMITS = {
    "rss_bytes": 0.15 * MIB,
    "pss_bytes": 0.5 * MIB,
    "descriptors": 0.1,
    "threads": 0.1,
    "state_bytes": 0.1 * MIB,
    "rows_adapters": 0.2,
    "rows_checkpoints": 0.4,
    "rows_sessions": 0.2,
    "live_sessions": 0.2,
}
"""Most that each may grow a minute. Memory: in the second half of fourteen minutes that of a server whose stores are
full grew by a fortieth of a MiB a minute, and samples differ by a third of one, so that .2 is seen for certain and .1
let pass; .15 are 1.5 GiB in a week. PSS moves with what other processes of the machine share, so it has a limit for
what is plain only. The state wanders by two MiB as checkpoints come and go. Descriptors and threads: one in ten
minutes."""
JUMPS = {"rss_bytes": (MIB, 8 * MIB), "pss_bytes": (MIB, 8 * MIB)}
"""One rise that is forgiven: the heap took four MiB at once, once, in half an hour."""
BOUNDS = {"most_responses": MAX_RESPONSES, "most_ends": MAX_ENDS}
"""Rows that no tenant ever has more of. They are that many from the beginning (`full`)."""
WARM_UP = 1 / 2
"""Of the time: what fills by use (SQLite's pages, threads, the heap) does so until then."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between samples")
    parser.add_argument("--trainers", type=int, default=4, help="trainers at once, and as many who only ask")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--passes", type=int, default=MAX_RESPONSES, help="of each tenant, before it begins")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where soak.json and soak.png are written")
    chosen = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="onebase-soak-") as folder:
        record, samples = soak(Path(folder), chosen, console)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(samples, record["minutes"] * 60 * WARM_UP, chosen.out)
    for line in record["failures"]:
        console.print(f"[bold red]failed[/] {line}", soft_wrap=True)
    if record["failures"]:
        sys.exit(1)
    console.print(
        "[bold green]held[/]", f"{record['calls']} calls in {record['minutes']:g} minutes; nothing above its limit"
    )


def soak(folder: Path, chosen: argparse.Namespace, console: Console) -> tuple[dict[str, Any], Samples]:
    """Runs server and load, and judges.

    Returns:
        what is written down, and the samples.
    """
    state, tokens = folder / "state", TokenFile(folder / "tokens.json")
    fill(state, TENANTS)
    operator = tokens.add("operator", tuple(Scope), (), None)
    theirs = [tokens.add(tenant, tuple(Scope), (), None) for tenant in TENANTS]
    flags = ("--state", str(state), "--durability", "step", "--tokens", str(folder / "tokens.json"), "--threads", "1")
    with start_server(FIXTURES / "base", *flags, "--reward", f"reward={FIXTURES / 'reward'}") as server:
        stubs = Stubs(server.address, operator)
        service = server_pb2_grpc.ServerServiceStub(stubs.channel)

        def status() -> server_pb2.ServerStatus:
            return service.GetStatus(server_pb2.GetStatusRequest(), metadata=stubs.metadata, timeout=60)

        watch = Watch(server.process.pid, state, status)
        load = Load(server.address, theirs, chosen.trainers, chosen.seed)
        with console.status("Filling …"):
            load.fill(chosen.passes)
        load.start()
        _watch(watch, load, chosen.minutes * 60, chosen.every, console)
        load.stop()
        time.sleep(8.0)  # the last sessions run out
        end = watch.sample()
        lived = server.process.poll() is None
        log = server.text()
    failures = judge(watch.samples.after(chosen.minutes * 60 * WARM_UP)) + over(watch.samples)
    failures += left(end) + sorted(set(load.wrong))[:20]
    if not lived or "Traceback" in log:
        failures.append(f"the server did not live, or a bug was logged:\n{log[-2000:]}")
    return _record(chosen.minutes, watch.samples, load, failures), watch.samples


def _watch(watch: Watch, load: Load, seconds: float, every: float, console: Console) -> None:
    began = time.monotonic()
    told = began
    with console.status("Soaking …") as shown:
        while (now := time.monotonic()) - began < seconds:
            found = watch.sample()
            line = (
                f"{(now - began) / 60:5.1f} of {seconds / 60:g} min: {sum(load.done.values())} calls, RSS "
                f"{found['rss_bytes'] / MIB:.1f} MiB, {found['descriptors']:.0f} descriptors, "
                f"{found['threads']:.0f} threads, state {found['state_bytes'] / MIB:.1f} MiB, "
                f"{found['rows_responses']:.0f} answers"
            )
            shown.update(line)
            if now - told > 60:
                told = now
                console.print(line)
            time.sleep(every)


def judge(samples: Samples) -> list[str]:
    """What grows, in words."""
    failures = []
    for name, limit in LIMITS.items():
        try:
            found = _slope(samples, name)
        except ValueError as error:
            return [f"the run was too short to judge: {error}"]
        if found.above(limit):
            interval = f"{found.low:,.2f} to {found.high:,.2f}"
            failures.append(f"{name} grows by {found.value:,.2f} a minute ({interval}), and may by {limit:,.2f}")
    return failures


def _slope(samples: Samples, name: str) -> Slope:
    return slope(samples.seconds, samples.series[name], jump=JUMPS.get(name, (math.inf, math.inf)))


def over(samples: Samples) -> list[str]:
    """Bounds that a tenant was above at any time, or that nobody was at first: then growth may have been filling."""
    failures = []
    for name, bound in BOUNDS.items():
        values = samples.series[name]
        if max(values) > bound:
            failures.append(f"{name} was {max(values):.0f}, and may be {bound}")
        if values[0] < bound:
            failures.append(f"{name} was {values[0]:.0f} at first, and not full: {bound}")
    return failures


def left(end: dict[str, float]) -> list[str]:
    """What is still there when everybody has gone."""
    names = ("kv_slots_used", "live_sessions", "rows_adapters", "rows_checkpoints", "rows_sessions")
    return [f"{name} is {end[name]:.0f} when everybody has gone" for name in names if end[name]]


def _record(minutes: float, samples: Samples, load: Load, failures: list[str]) -> dict[str, Any]:
    judged = samples.after(minutes * 60 * WARM_UP)
    slopes = {}
    for name, limit in LIMITS.items():
        try:
            found = _slope(judged, name)
        except ValueError:
            continue
        slopes[name] = {"per_minute": found.value, "low": found.low, "high": found.high, "limit": limit}
    return {
        "minutes": minutes,
        "calls": sum(load.done.values()),
        "by_kind": dict(sorted(load.done.items())),
        "first": {name: values[0] for name, values in samples.series.items()},
        "last": {name: values[-1] for name, values in samples.series.items()},
        "slopes": slopes,
        "failures": failures,
    }


if __name__ == "__main__":
    main()
