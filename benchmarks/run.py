"""Measures onebase against its peers: `python benchmarks/run.py`, or `make bench` and `make bench-peers`.

Cases are in cases/, their keys and targets in registry.py. Everything runs on one thread; see measure.py.
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)

import traceback
import warnings
from pathlib import Path
from typing import Annotated

import growth
import plots
import report
import torch
import typer
from bench import Bench
from measure import Effort, Figure, NotMeasured
from registry import CASES, Case
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
GROWTH = "growth"
"""The name under which --only asks for the plots."""
QUICK, GROWTH_EFFORT = Effort(3, 2.0), Effort(5, 3.0)

Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure this key, or all that begin so; `growth` is the plots. May be repeated; others are kept."
    ),
]
Pairs = Annotated[int, typer.Option(min=1, help="Most interleaved pairs of a ratio.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="About how long the pairs of a ratio may take, three at least.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few pairs and single rounds, to see that everything runs.")]
Out = Annotated[Path, typer.Option(help="Where to write; a page and the plots go next to it.")]
TrlPython = Annotated[
    Path, typer.Option(envvar="ONEBASE_TRL_PYTHON", help="The interpreter of an environment with TRL 0.11.4.")
]


def main(
    only: Only = None,
    pairs: Pairs = 9,
    seconds: Seconds = 20.0,
    quick: Quick = False,
    out: Out = HERE / "results" / "latest.json",
    trl_python: TrlPython = HERE.parent / ".venv-oracle" / "bin" / "python",
) -> None:
    """Measure, and write latest.json, latest.md and the plots."""
    console = Console(highlight=False)
    cases = [case for case in CASES if _asked(case.key, only)]
    if not cases and not _asked(GROWTH, only):
        console.print(f"[red]error[/] --only is {only}: the keys are {', '.join(c.key for c in CASES)}, {GROWTH}")
        raise typer.Exit(2)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    bench = Bench(QUICK if quick else Effort(pairs, seconds), trl_python, quick)
    found: report.Report = {"machine": report.machine(), "versions": report.versions(), "ratios": {}, "growth": {}}
    failed = False
    with _progress(console) as progress:
        task = progress.add_task("", total=len(cases) + (len(growth.PLOTS) if _asked(GROWTH, only) else 0))
        try:
            for case in cases:
                progress.update(task, description=case.key)
                figure = _measured(case, bench)
                failed |= isinstance(figure, str) and figure.startswith("failed")
                found["ratios"][case.key] = report.entry(case, figure)
                progress.advance(task)
            curves = []
            for make in growth.PLOTS if _asked(GROWTH, only) else ():
                progress.update(task, description=make.__name__)
                curves.append(make(bench, QUICK if quick else GROWTH_EFFORT))
                progress.advance(task)
        finally:
            bench.close()
    found["growth"] = report.growth_entry(curves)
    whole = report.merged(found, out, [case.key for case in CASES]) if only else found
    report.write(whole, out)
    for curve in curves:
        plots.draw(curve, out.parent)
    console.print(report.table(found["ratios"]))
    console.print(f"Written to {out} and {out.with_suffix('.md').name}.", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _asked(key: str, only: list[str] | None) -> bool:
    return not only or any(key.startswith(one) for one in only)


def _measured(case: Case, bench: Bench) -> Figure | str:
    """The case's figure, or why there is none; one that fails does not end the run."""
    try:
        return case.run(bench)
    except NotMeasured as reason:
        return str(reason)
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
    )


if __name__ == "__main__":
    typer.run(main)
