"""Stage 3: one server, two PPO trainings at once on its one base, and a third process that asks the reward model.

`train_policies` is what the demo runs after stages 1 and 2. By hand it is, in four terminals:

    onebase serve .demo/base --reward sentiment=.demo/reward --root .demo/adapters --threads 1
    onebase train examples/sentiment/policy_1.yaml
    onebase train examples/sentiment/policy_2.yaml
    onebase reward --repl
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from common import read_jsonl
from processes import Child, Children, wait_for_file
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from onebase.client import Client, ServerStatus, connect
from onebase.trainer.display import sparkline

HERE = Path(__file__).resolve().parent
ONEBASE = (sys.executable, "-m", "onebase.client.cli")
START_SECONDS = 120.0
PLAIN_LINE_SECONDS = 10.0
TREND_WIDTH = 24


@dataclass(frozen=True)
class Policy:
    """A policy to train: its configuration, its one reward adapter and that one's weight, and where its run goes."""

    name: str
    config: Path
    adapter: str
    weight: float
    run: Path

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """Step, mean score of the reward adapter (without the weight) and KL, for every step so far."""
        path = self.run / "metrics.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        return [(row["step"], row[f"reward/{self.adapter}"], row["objective/kl"]) for row in rows if row["step"] > 0]


@dataclass(frozen=True)
class Paths:
    """Where things are: what stages 1 and 2 made, and what stage 3 makes under `root`."""

    root: Path
    base: Path
    reward: Path
    data: Path

    @property
    def questions(self) -> Path:
        """What the third process asked."""
        return self.root / "interactive.jsonl"

    def policy(self, config: Path) -> Policy:
        """The policy of a configuration with one reward adapter."""
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        (term,) = settings["rewards"]
        name = settings["policy"]["name"]
        return Policy(name, config, term["adapter"], float(term["weight"]), self.root / "runs" / name)


@dataclass(frozen=True)
class Latencies:
    """How long interactive reward questions took, in milliseconds."""

    count: int
    p50_ms: float
    p95_ms: float


def read_latencies(questions: Path) -> Latencies:
    """Latencies of the questions asked so far; NaN if there are none."""
    asked = [row["ms"] for row in read_jsonl(questions)] if questions.exists() else []
    p50, p95 = np.percentile(asked, [50, 95]) if asked else (float("nan"), float("nan"))
    return Latencies(len(asked), float(p50), float(p95))


def train_policies(
    policies: Sequence[Policy],
    paths: Paths,
    children: Children,
    console: Console,
    flags: Sequence[str] = (),
) -> ServerStatus:
    """Serves, trains all policies at once while questions are asked, and stops the server again.

    Args:
        policies: what to train; all with the same reward adapter.
        paths: the base, the reward adapter, the prompts, and where to write; an earlier stage 3 there is removed.
        children: starts the processes.
        console: where to show progress.
        flags: for both trainings, over their configurations.

    Returns:
        What the server said of itself when both trainings had ended.

    Raises:
        ChildFailed: a process ended with an error.
    """
    clear(paths)
    adapter = policies[0].adapter
    server, address = serve(paths, adapter, children)
    trainings = [start_training(policy, address, paths, children, flags) for policy in policies]
    ask = [
        sys.executable,
        str(HERE / "interactive.py"),
        str(paths.questions),
        "--server",
        address,
        "--adapter",
        adapter,
    ]
    asking = children.start("interactive", ask, endless=True)
    with connect(address) as client:
        _watch(client, policies, trainings, paths, children, console)
        status = client.status()
    for child in (asking, server):
        if code := children.stop(child):
            raise child.failure(f"ended with exit code {code} when it was told to stop")
    return status


def clear(paths: Paths) -> None:
    """Removes what an earlier run under this root left."""
    for directory in ("runs", "adapters"):
        shutil.rmtree(paths.root / directory, ignore_errors=True)
    for file in (paths.questions, paths.root / "port"):
        file.unlink(missing_ok=True)


def serve(paths: Paths, adapter: str, children: Children) -> tuple[Child, str]:
    """Starts a server of the base with the reward adapter; returns it and its address once it answers."""
    port_file = paths.root / "port"
    command = [*ONEBASE, "serve", str(paths.base), "--reward", f"{adapter}={paths.reward}"]
    command += ["--root", str(paths.root / "adapters"), "--port", "0", "--port-file", str(port_file), "--threads", "1"]
    child = children.start("server", command, endless=True)
    return child, f"127.0.0.1:{wait_for_file(port_file, child, children, START_SECONDS)}"


def start_training(policy: Policy, address: str, paths: Paths, children: Children, flags: Sequence[str]) -> Child:
    """Starts a training, with flags over its configuration."""
    command = [*ONEBASE, "train", str(policy.config), "--server", address, "--output_dir", str(policy.run)]
    command += ["--prompts.path", str(paths.data / "prompts.jsonl")]
    command += ["--eval_prompts.path", str(paths.data / "prompts_heldout.jsonl")]
    return children.start(policy.name, [*command, *flags])


# ------------------------------------------------------------------------------------------------------ the screen


def _watch(
    client: Client,
    policies: Sequence[Policy],
    trainings: Sequence[Child],
    paths: Paths,
    children: Children,
    console: Console,
) -> None:
    """Shows both trainings until they have ended."""
    with _screen(console) as show:
        while any(child.running for child in trainings):
            children.check()
            show(progress(policies, read_latencies(paths.questions), client.status()))
            time.sleep(0.5)
        show(progress(policies, read_latencies(paths.questions), client.status()))
    children.check()
    for policy, child in zip(policies, trainings, strict=True):
        if not (policy.run / "summary.json").exists():
            raise child.failure("was interrupted before its last step")


@contextmanager
def _screen(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """A place that is drawn anew on a terminal; elsewhere it is printed every ten seconds."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda shown: live.update(shown, refresh=True)
        return
    due = time.monotonic()

    def show(shown: RenderableType) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + PLAIN_LINE_SECONDS
            console.print(shown)

    yield show


def progress(policies: Sequence[Policy], asked: Latencies, status: ServerStatus) -> RenderableType:
    """How far both trainings are, the questions asked beside them, and what the server does."""
    table = Table("policy", "weight", "step", "reward", "trend", "KL", title="stage 3: two policies on one base")
    for policy in policies:
        curve = policy.curve
        step, reward, kl = curve[-1] if curve else (0, float("nan"), float("nan"))
        trend = sparkline([reward for _, reward, _ in curve], TREND_WIDTH) if curve else ""
        table.add_row(policy.name, f"{policy.weight:+g}", str(step), f"{reward:+.2f}", trend, f"{kl:.2f}")
    questions = f"reward questions asked: {asked.count}"
    if asked.count:
        questions += f", p50 {asked.p50_ms:.0f} ms, p95 {asked.p95_ms:.0f} ms"
    server = (
        f"server: {len(status.sessions)} sessions, {status.generated_tokens_per_second:.0f} tokens/s generated, "
        f"{status.scored_tokens_per_second:.0f} scored, {status.trained_tokens_per_second:.0f} trained on, "
        f"{status.rss_bytes / 2**20:.0f} MiB"
    )
    return Group(table, questions, server)
