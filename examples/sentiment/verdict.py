"""What the demo ends with: a table, samples, a plot, summary.json, and a verdict on its own results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from stage3 import Latencies, Policy

from onebase.client import ServerStatus

LEAST_ACCURACY = 0.9
LEAST_CHANGE = 1.5
"""How far a policy's mean reward must move, in standard deviations of the rewards before."""
SAMPLES_SHOWN = 4


@dataclass(frozen=True)
class Sample:
    """What a policy wrote to a held-out prompt before and after, and the scores of that."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


@dataclass(frozen=True)
class Result:
    """What a training gave; rewards are the reward adapter's scores on held-out prompts, without the weight."""

    weight: float
    reward_before: float
    reward_after: float
    reward_std_before: float
    kl: float
    steps: int
    adapter_version: int
    samples: tuple[Sample, ...]

    @property
    def change(self) -> float:
        """How far the mean reward moved to where the weight's sign points, in standard deviations before."""
        return math.copysign(1, self.weight) * (self.reward_after - self.reward_before) / self.reward_std_before

    @property
    def summary(self) -> dict[str, float | int]:
        """What summary.json says of it."""
        names = ("reward_before", "reward_after", "reward_std_before", "kl", "steps", "adapter_version")
        return {name: getattr(self, name) for name in names}


def read_result(policy: Policy) -> Result:
    """Reads what `onebase train` wrote; its rewards are weighted, and here the weight is taken out again."""
    summary = json.loads((policy.run / "summary.json").read_text(encoding="utf-8"))
    samples = tuple(
        Sample(
            row["prompt"],
            row["before"],
            row["after"],
            row["reward_before"] / policy.weight,
            row["reward_after"] / policy.weight,
        )
        for row in summary["samples"]
    )
    return Result(
        weight=policy.weight,
        reward_before=summary["scores_before"][policy.adapter],
        reward_after=summary["scores_after"][policy.adapter],
        reward_std_before=summary["reward_std_before"] / abs(policy.weight),
        kl=summary["kl"],
        steps=summary["steps"],
        adapter_version=summary["adapter_version"],
        samples=samples,
    )


def summarize(
    results: Mapping[str, Result], pair_accuracy: float, latencies: Latencies, status: ServerStatus, seconds: float
) -> dict[str, Any]:
    """The content of summary.json. Times of questions are in milliseconds, all else in bytes and seconds."""
    return {
        "policies": {name: result.summary for name, result in results.items()},
        "reward_model": {"pair_accuracy": pair_accuracy},
        "interactive_reward": {"count": latencies.count, "p50_ms": latencies.p50_ms, "p95_ms": latencies.p95_ms},
        "server": {
            "peak_rss_bytes": status.peak_rss_bytes,
            "base_bytes": status.base_bytes,
            "adapter_bytes": {adapter.name: adapter.total_bytes for adapter in status.adapters},
        },
        "seconds": seconds,
    }


def shortcomings(results: Mapping[str, Result], pair_accuracy: float, latencies: Latencies) -> list[str]:
    """What the demo promises and these results do not keep, a sentence each."""
    found = []
    if not pair_accuracy >= LEAST_ACCURACY:
        found.append(f"The reward model ranks {pair_accuracy:.3f} of the held-out pairs rightly, not {LEAST_ACCURACY}.")
    for name, result in results.items():
        if not result.change >= LEAST_CHANGE:
            way = "up" if result.weight > 0 else "down"
            found.append(
                f"The reward of {name} went from {result.reward_before:+.2f} to {result.reward_after:+.2f}, which is "
                f"{result.change:.2f} standard deviations {way}, not {LEAST_CHANGE}."
            )
        if not math.isfinite(result.kl):
            found.append(f"The KL of {name} is {result.kl}, not a finite number.")
    if latencies.count == 0:
        found.append("Not one question to the reward model was answered while the policies trained.")
    return found


def show(console: Console, results: Mapping[str, Result], latencies: Latencies, pair_accuracy: float) -> None:
    """Prints both tables: numbers by policy, and completions side by side."""
    table = Table(
        "policy", "reward before", "reward after", "change", "KL", "steps", "version", title="Held-out prompts"
    )
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.reward_before:+.2f} ± {result.reward_std_before:.2f}",
            f"{result.reward_after:+.2f}",
            f"{result.reward_after - result.reward_before:+.2f} ({result.change:.1f} σ)",
            f"{result.kl:.2f}",
            str(result.steps),
            str(result.adapter_version),
        )
    console.print(table)
    console.print(samples_table(results))
    console.print(
        f"Reward model: {pair_accuracy:.1%} of held-out pairs ranked rightly. Interactive questions while both "
        f"policies trained: {latencies.count}, p50 {latencies.p50_ms:.0f} ms, p95 {latencies.p95_ms:.0f} ms."
    )


def samples_table(results: Mapping[str, Result]) -> Table:
    """The same prompts and seeds, before and after: one column for the untrained base, one for each policy."""
    table = Table("prompt", "before", *results, title="Completions of the same prompts and seeds", show_lines=True)
    for row in zip(*(result.samples[:SAMPLES_SHOWN] for result in results.values()), strict=True):
        first = row[0]
        cells = [f"{escape(sample.after.strip())} [bold]{sample.reward_after:+.2f}[/]" for sample in row]
        table.add_row(
            escape(first.prompt), f"{escape(first.before.strip())} [bold]{first.reward_before:+.2f}[/]", *cells
        )
    return table


def plot(policies: Sequence[Policy], path: Path) -> None:
    """Draws the reward of every step, and below it the KL to the reference."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    rewards, kls = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for policy in policies:
        steps, reward, kl = zip(*policy.curve, strict=True)
        rewards.plot(steps, reward, marker=".", label=f"{policy.name} (weight {policy.weight:+g})")
        kls.plot(steps, kl, marker=".")
    rewards.set_title("Two policies trained at once on one base model")
    rewards.set_ylabel("mean score of the reward adapter")
    rewards.legend()
    kls.set_ylabel("KL to the base, nats")
    kls.set_xlabel("PPO step")
    for axes in (rewards, kls):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
