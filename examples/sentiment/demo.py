"""`make demo`: a base, a reward adapter, and two policies that learn opposite things from it, at once, on one server.

    python examples/sentiment/demo.py

Stages 1 and 2 are kept under .demo and made again only if something they are made of has changed. It ends with a
table, .demo/reward_curves.png and .demo/summary.json; the exit code is 0 if the policies went where they were sent.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from common import read_record, write_json
from processes import ChildFailed, Children
from rich.console import Console
from rich.markup import escape
from stage3 import Paths, read_latencies, train_policies
from stages import demo_stages, run_stage
from verdict import plot, read_result, shortcomings, show, summarize

HERE = Path(__file__).resolve().parent
CONFIGS = (HERE / "policy_1.yaml", HERE / "policy_2.yaml")


def run(root: Path, console: Console) -> list[str]:
    """Runs all stages under `root`; returns what the results fall short of.

    Raises:
        ChildFailed: a process ended with an error. None is left running.
    """
    began = time.monotonic()
    data, base, reward = demo_stages(root)
    paths = Paths(root, base.output, reward.output, data.output)
    policies = [paths.policy(config) for config in CONFIGS]
    with Children(root / "logs") as children:
        for stage in (data, base, reward):
            run_stage(stage, children, console)
        status = train_policies(policies, paths, children, console)
    results = {policy.name: read_result(policy) for policy in policies}
    latencies = read_latencies(paths.questions)
    accuracy = float(read_record(reward.output)["pair_accuracy"])
    show(console, results, latencies, accuracy)
    plot(policies, root / "reward_curves.png")
    seconds = time.monotonic() - began
    write_json(root / "summary.json", summarize(results, accuracy, latencies, status, seconds))
    console.print(f"{seconds:.0f} s in all. Written: {root / 'reward_curves.png'}, {root / 'summary.json'}")
    return shortcomings(results, accuracy, latencies)


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(
    output: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path(".demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Make stages 1 and 2 again.")] = False,
) -> None:
    """Runs the three stages of the sentiment example."""
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _terminated)
    if fresh:
        for stage in demo_stages(output):
            shutil.rmtree(stage.output, ignore_errors=True)
    try:
        missed = run(output, console)
    except ChildFailed as error:
        console.print(f"[bold red]The demo failed:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted; every process has ended.")
        raise typer.Exit(130) from None
    for sentence in missed:
        console.print(f"[bold red]Not reached:[/] {sentence}", soft_wrap=True)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
