"""What the demo shows at its end: tables, a plot, and whether the policies went where they should."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

mpl.use("Agg")

ENOUGH = 1.5
"""How far a policy must have moved, in standard deviations of the reward before."""

LEAST_ACCURACY = 0.9


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lie (nearest rank); nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def failures(summary: Mapping[str, Any], directions: Mapping[str, float]) -> list[str]:
    """What fell short, in sentences.

    Args:
        summary: the content of summary.json.
        directions: +1 for a policy that should raise the reward, -1 for one that should lower it.
    """
    found = []
    for name, direction in directions.items():
        policy = summary["policies"][name]
        moved = direction * (policy["reward_after"] - policy["reward_before"])
        wanted = ENOUGH * policy["reward_std_before"]
        if not moved >= wanted:
            found.append(f"{name} moved the reward by {moved:.2f} in its direction; at least {wanted:.2f} was expected")
        if not math.isfinite(policy["kl"]):
            found.append(f"{name}'s KL is {policy['kl']}")
    accuracy = summary["reward_model"]["pair_accuracy"]
    if not accuracy >= LEAST_ACCURACY:
        found.append(f"the reward model ranks {accuracy:.1%} of held-out pairs right; at least {LEAST_ACCURACY:.0%}")
    return found


def show(console: Console, summary: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Prints the tables."""
    table = Table(title="Two policies on one base: mean reward of held-out prompts, fixed seeds")
    for column in ("policy", "before", "after", "moved by", "KL to the base", "steps", "version"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, policy in summary["policies"].items():
        moved = policy["reward_after"] - policy["reward_before"]
        table.add_row(
            name,
            f"{policy['reward_before']:+.2f} ± {policy['reward_std_before']:.2f}",
            f"{policy['reward_after']:+.2f}",
            f"{moved / policy['reward_std_before']:+.1f} standard deviations",
            f"{policy['kl']:.2f}",
            str(policy["steps"]),
            str(policy["adapter_version"]),
        )
    console.print(table)
    names = list(samples)
    table = Table(title="The same prompts, the same seeds", show_lines=True)
    for column in ("prompt", "before", *(f"after: {name}" for name in names)):
        table.add_column(column, ratio=1)
    for rows in zip(*(samples[name][:4] for name in names), strict=False):
        first = rows[0]
        cells = [f"{row['after'].strip()} [dim]({row['reward_after']:+.1f})[/]" for row in rows]
        table.add_row(first["prompt"], f"{first['before'].strip()} [dim]({first['reward_before']:+.1f})[/]", *cells)
    console.print(table)
    asked, server = summary["interactive_reward"], summary["server"]
    console.print(
        f"While they trained, a third process asked the reward model {asked['count']} times: "
        f"half of the answers came within {asked['p50_ms']:.0f} ms, 95 % within {asked['p95_ms']:.0f} ms."
    )
    adapters = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in server["adapter_bytes"].items())
    console.print(
        f"One server: base {server['base_bytes'] / 2**20:.1f} MiB, {adapters}; "
        f"{server['peak_rss_bytes'] / 2**20:.0f} MiB resident at most. "
        f"The reward model ranks {summary['reward_model']['pair_accuracy']:.1%} of held-out pairs right."
    )


def plot(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], reward: str) -> None:
    """Draws the reward of every step's rollouts, and below it the KL to the base.

    Args:
        path: the PNG.
        runs: each policy's metrics, a row a step.
        reward: the metric of the raw reward.
    """
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    for name, rows in runs.items():
        steps = [row["step"] for row in rows if reward in row]
        above.plot(steps, [row[reward] for row in rows if reward in row], marker=".", label=name)
        below.plot(steps, [row["objective/kl"] for row in rows if reward in row], marker=".")
    above.set_ylabel("mean reward of the rollouts")
    above.axhline(0, color="grey", linewidth=0.5)
    above.legend()
    above.set_title("Two PPO trainings on one base, at the same time")
    below.set_ylabel("KL to the base")
    below.set_xlabel("PPO step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
