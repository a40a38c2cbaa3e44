"""What a run found, as latest.json, latest.md and a table on the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from onebase.server.engine.precision import widens

if TYPE_CHECKING:
    from growth import Plot
    from measure import Figure
    from registry import Case

PACKAGES = ("onebase", "torch", "transformers", "peft", "numpy", "grpcio")
Report = dict[str, Any]


def machine() -> dict[str, Any]:
    """What it was measured on; the load says whether others were at work, bfloat16 how our engine multiplies it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "threads": 1,
        "bfloat16": "in float32" if widens(torch.bfloat16, torch.device("cpu"), exact=False) else "by the CPU",
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def entry(case: Case, found: Figure | str) -> dict[str, Any]:
    """A figure's part of latest.json; a text says why there is none."""
    common = {
        "unit": case.unit,
        "sides": case.sides,
        "target": case.target,
        "better": "lower" if case.lower else "higher",
    }
    if isinstance(found, str):
        none = dict.fromkeys(("value", "low", "high"))
        return {**none, "pairs": 0, **common, "met": False, "not_measured": found}
    return {**asdict(found), **common, "met": case.met(found.value)}


def merged(new: Report, path: Path, order: Sequence[str]) -> Report:
    """A report with the figures and curves that only an earlier one at this path has; keys in their order."""
    old: Report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ratios = {**old.get("ratios", {}), **new["ratios"]}
    return {
        **new,
        "ratios": {key: ratios[key] for key in order if key in ratios},
        "growth": {**old.get("growth", {}), **new["growth"]},
    }


def growth_entry(plots: Sequence[Plot]) -> dict[str, Any]:
    """The curves, by name."""
    return {plot.name: asdict(plot) for plot in plots}


def write(report: Report, path: Path) -> None:
    """Writes the report, and the same to be read next to it as .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    """The report as a page."""
    where, with_ = report["machine"], report["versions"]
    lines = [
        "# Benchmarks",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB; one thread, process CPU time unless said "
        f"otherwise; load {where['load_before']} when it began; our bfloat16 products {where['bfloat16']}. "
        + ", ".join(f"{name} {version}" for name, version in with_.items())
        + ".",
        "",
        "A ratio is that of the medians of interleaved pairs; in brackets the quartiles of the pairs' own ratios.",
        "",
        "| | key | value | target | pairs | sides |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(key, found) for key, found in report["ratios"].items()]
    details = [(key, found["detail"]) for key, found in report["ratios"].items() if found.get("detail")]
    if details:
        lines += ["", "## Behind the figures", ""]
        lines += [f"- {key}: " + ", ".join(f"{n} {_number(v)}" for n, v in detail.items()) for key, detail in details]
    if report["growth"]:
        lines += ["", "## How cost grows", ""]
        lines += [f"![{plot['title']}]({name}.png)" for name, plot in report["growth"].items()]
    return "\n".join(lines) + "\n"


def table(ratios: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures for a terminal."""
    shown = Table(title="Benchmarks", header_style="bold")
    for name in ("", "key", "value", "quartiles", "target", "pairs"):
        shown.add_column(name, justify="left" if name in ("", "key") else "right", no_wrap=True)
    for key, found in ratios.items():
        mark = {True: "[green]✓[/]", False: "[red]✗[/]"}[found["met"]]
        if found["value"] is None:
            shown.add_row("[dim]–[/]", key, "[dim]not measured[/]", "", _target(found), "")
            continue
        span = f"{_number(found['low'])} – {_number(found['high'])}"
        shown.add_row(mark, key, _number(found["value"]), span, _target(found), str(found["pairs"]))
    return shown


def _row(key: str, found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return f"| – | `{key}` | not measured | {_target(found)} | | {found['not_measured']} |"
    value = f"**{_number(found['value'])}** ({_number(found['low'])} – {_number(found['high'])})"
    mark = "✓" if found["met"] else "✗"
    return f"| {mark} | `{key}` | {value} | {_target(found)} | {found['pairs']} | {found['sides']} |"


def _target(found: Mapping[str, Any]) -> str:
    return f"{'≤' if found['better'] == 'lower' else '≥'} {found['target']:g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
