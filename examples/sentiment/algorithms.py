"""`make algorithms`: the same policy by PPO, GRPO, RLOO and REINFORCE++, on as many completions each, on one server.

    python examples/sentiment/algorithms.py

Stages 1 and 2 are those of the demo and are kept under .demo. The trainings run one after another, so that each has
the server to itself. Writes docs/algorithms.json, docs/algorithms.svg and the table in docs/algorithms.md; the exit
code is 0 if GRPO and RLOO gained at least what PPO did.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
import yaml
from common import read_jsonl, write_json
from matplotlib.figure import Figure
from processes import Child, ChildFailed, Children
from rich.console import Console
from rich.markup import escape
from stage3 import Paths, Policy, clear, serve, start_training
from stages import demo_stages, run_stage

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
CONFIGS = {
    "ppo": HERE / "policy_1.yaml",
    "grpo": HERE / "grpo.yaml",
    "rloo": HERE / "rloo.yaml",
    "reinforce_pp": HERE / "reinforce_pp.yaml",
}
NAMES = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++"}
AT_LEAST_PPO = ("grpo", "rloo")
LAST_STEPS = 5
"""The KL at the end is the mean of so many last steps: one step's is noisy."""
TABLE = ("<!-- table -->", "<!-- end of table -->")
PACKAGES = ("onebase", "torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Outcome:
    """What one training gave; rewards are of held-out prompts, KL is per completion, in nats."""

    reward_before: float
    reward_after: float
    reward_std_before: float
    gain: float
    """How far the mean reward moved, in standard deviations of the rewards before."""
    kl: float
    steps: int
    completions: int
    tokens: int
    """Tokens of all completions that were learned from."""
    seconds: float
    settings: dict[str, Any]
    curve: list[tuple[int, float, float]]
    """Step, mean reward and KL."""


def run(root: Path, docs: Path, console: Console) -> list[str]:
    """Runs everything under `root`, writes to `docs`; returns what the results fall short of.

    Raises:
        ChildFailed: a process ended with an error. None is left running.
    """
    began = time.monotonic()
    data, base, reward = demo_stages(root)
    paths = Paths(root / "algorithms", base.output, reward.output, data.output)
    with Children(paths.root / "logs") as children:
        for stage in (data, base, reward):
            run_stage(stage, children, console)
        outcomes = train_all(paths, children, console)
    write(docs, outcomes, time.monotonic() - began)
    return shortcomings(outcomes)


def train_all(paths: Paths, children: Children, console: Console, flags: Sequence[str] = ()) -> dict[str, Outcome]:
    """Trains by each algorithm in turn on one server, with flags over the configurations; outcomes by algorithm.

    Raises:
        ChildFailed: a process ended with an error.
    """
    clear(paths)
    server, address = serve(paths, "sentiment", children)
    outcomes: dict[str, Outcome] = {}
    for algorithm, config in CONFIGS.items():
        policy = paths.policy(config)
        started = time.monotonic()
        _wait(policy, start_training(policy, address, paths, children, flags), children)
        outcomes[algorithm] = read_outcome(algorithm, policy, time.monotonic() - started)
        console.print(line(algorithm, outcomes[algorithm]), soft_wrap=True)
    if code := children.stop(server):
        raise server.failure(f"ended with exit code {code} when it was told to stop")
    return outcomes


def _wait(policy: Policy, child: Child, children: Children) -> None:
    while child.running:
        children.check()
        time.sleep(0.2)
    children.check()
    if not (policy.run / "summary.json").exists():
        raise child.failure("was interrupted before its last step")


def read_outcome(algorithm: str, policy: Policy, seconds: float) -> Outcome:
    """Reads what a training left, which took so many seconds."""
    summary = json.loads((policy.run / "summary.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load(policy.config.read_text(encoding="utf-8"))
    section = settings[algorithm]
    steps = [row for row in read_jsonl(policy.run / "metrics.jsonl") if row["step"] > 0]
    batch = section["batch_size"]
    return Outcome(
        reward_before=summary["reward_before"],
        reward_after=summary["reward_after"],
        reward_std_before=summary["reward_std_before"],
        gain=(summary["reward_after"] - summary["reward_before"]) / summary["reward_std_before"],
        kl=float(np.mean([kl for _, _, kl in policy.curve[-LAST_STEPS:]])),
        steps=len(steps),
        completions=len(steps) * batch,
        tokens=round(sum(row["tokens/responses_len_mean"] for row in steps) * batch),
        seconds=seconds,
        settings=section,
        curve=policy.curve,
    )


def shortcomings(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What the page promises and these outcomes do not keep, a sentence each."""
    least = outcomes["ppo"].gain
    return [
        f"{NAMES[name]} gained {outcomes[name].gain:.2f} standard deviations, PPO {least:.2f}."
        for name in AT_LEAST_PPO
        if not outcomes[name].gain >= least
    ]


# ----------------------------------------------------------------------------------------------------- what is written


def write(docs: Path, outcomes: Mapping[str, Outcome], seconds: float) -> None:
    """Writes the numbers and the plot, and the table into the page."""
    content = {
        "algorithms": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "seconds": seconds,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    write_json(docs / "algorithms.json", content)
    plot(outcomes, docs / "algorithms.svg")
    page = docs / "algorithms.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(TABLE[0])
    _, after = rest.split(TABLE[1])
    page.write_text("\n".join((before + TABLE[0], table(outcomes), TABLE[1] + after)), encoding="utf-8")


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes in Markdown."""
    head = "| | reward before | after | gain (σ) | KL (nats) | completions | tokens | seconds |"
    rows = [
        f"| {NAMES[name]} | {one.reward_before:+.2f} | {one.reward_after:+.2f} | {one.gain:.2f} | {one.kl:.1f} "
        f"| {one.completions} | {one.tokens} | {one.seconds:.0f} |"
        for name, one in outcomes.items()
    ]
    return "\n".join((head, "|---|" + "---:|" * 7, *rows))


def line(algorithm: str, outcome: Outcome) -> str:
    """An outcome for the screen."""
    return (
        f"{NAMES[algorithm]}: reward {outcome.reward_before:+.2f} before, {outcome.reward_after:+.2f} after, which is "
        f"{outcome.gain:.2f} standard deviations; KL {outcome.kl:.1f}, {outcome.seconds:.0f} s"
    )


def plot(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draws the reward of every step, and beside it against the KL that it cost."""
    with matplotlib.rc_context({"svg.hashsalt": "onebase"}):  # the same numbers give the same file
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        by_step, by_kl = figure.subplots(1, 2, sharey=True)
        for name, outcome in outcomes.items():
            steps, rewards, kls = (np.array(column) for column in zip(*outcome.curve, strict=True))
            by_step.plot(steps, rewards, label=NAMES[name])
            by_kl.plot(kls, rewards, ".", label=NAMES[name])
        by_step.set_xlabel("step")
        by_step.set_ylabel("mean reward of the batch")
        by_kl.set_xlabel("KL to the base, nats")
        by_step.legend()
        for axes in (by_step, by_kl):
            axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(
    output: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path(".demo"),
    docs: Annotated[Path, typer.Option(help="Where the numbers, the plot and the table go.")] = DOCS,
) -> None:
    """Trains the same policy by each algorithm, and compares."""
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        missed = run(output, docs, console)
    except ChildFailed as error:
        console.print(f"[bold red]A process failed:[/] {escape(str(error))}", soft_wrap=True)
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
