"""The whole of onebase in one go: a base, a reward model, and two policies trained on it at the same time.

    make demo

1. data, and stage 1: a small language model learns to write movie reviews (stage1_sft.py, TRL's SFTTrainer)
2. stage 2: a reward adapter on it learns which of two reviews is kinder (stage2_reward.py, TRL's RewardTrainer)
3. stage 3: one `onebase serve`, two `onebase train` at once — policy_1 learns to please the reward model, policy_2 to
   displease it — and a third process that asks the reward model questions meanwhile

Stages 1 and 2 are kept under .demo/ and made again only when their scripts change. Ends with tables, a plot and
.demo/summary.json; exits with 1 if the policies did not go where they should.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import read_jsonl, read_record, write_json
from processes import Child, ChildFailed, Children
from report import failures, plot, quantile, show
from rich.console import Console
from rich.live import Live
from rich.table import Table

from onebase.client import connect

HERE = Path(__file__).parent
DIRECTIONS = {"policy_1": +1.0, "policy_2": -1.0}
REWARD = "sentiment"
STAGES = {  # output: what makes it, with what its content depends on
    "data": ("reviews.py", ["vocabulary.py", "common.py"]),
    "base": ("stage1_sft.py", ["training.py", "reviews.py", "vocabulary.py"]),
    "reward": ("stage2_reward.py", ["stage1_sft.py", "training.py", "reviews.py", "vocabulary.py"]),
}
TITLES = {
    "data": "Writing movie reviews",
    "base": "Stage 1: a base model learns their language",
    "reward": "Stage 2: a reward adapter learns which are kind",
}


def main(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path(".demo"),
    steps: Annotated[int, typer.Option(help="PPO steps of each policy; 0 is what the configs say.")] = 0,
) -> None:
    """Runs all three stages."""
    console = Console()
    began = time.monotonic()
    try:
        prepare(console, folder)
        summary, samples, runs = train(console, folder, steps)
    except ChildFailed as error:
        console.print(f"[bold red]{error}[/]", highlight=False)
        raise typer.Exit(1) from None
    summary["seconds"] = time.monotonic() - began
    write_json(folder / "summary.json", summary)
    plot(folder / "reward_curves.png", runs, f"reward/{REWARD}")
    show(console, summary, samples)
    console.print(f"{summary['seconds']:.0f} s in all; {folder / 'reward_curves.png'} and {folder / 'summary.json'}")
    for sentence in (short := failures(summary, DIRECTIONS)):
        console.print(f"[bold red]{sentence}[/]")
    raise typer.Exit(bool(short))


def prepare(console: Console, folder: Path) -> None:
    """Makes the data, the base and the reward adapter, unless they are there already."""
    made = folder / "stages.json"
    known: dict[str, str] = json.loads(made.read_text(encoding="utf-8")) if made.exists() else {}
    for stage, (script, others) in STAGES.items():
        output, fingerprint = folder / stage, digest([script, *others])
        if known.get(stage) == fingerprint and output.exists():
            console.print(f"{TITLES[stage]}: kept from before")
            continue
        with Children(folder / "logs") as children, console.status("") as status:
            shutil.rmtree(output, ignore_errors=True)
            child = children.start(stage, [sys.executable, str(HERE / script), *arguments(stage, folder)])
            start = time.monotonic()

            def tick(stage: str = stage, child: Child = child, start: float = start) -> None:
                status.update(f"{TITLES[stage]} … {time.monotonic() - start:.0f} s  [dim]{last_line(child.log)}[/]")

            children.wait(child, tick)
        record = {"base": "eval_loss", "reward": "pair_accuracy"}.get(stage)
        told = f", {record} {read_record(output)[record]:.3f}" if record else ""
        console.print(f"{TITLES[stage]}: {time.monotonic() - start:.0f} s{told}")
        known[stage] = fingerprint
        write_json(made, known)


def arguments(stage: str, folder: Path) -> list[str]:
    """The command line of a stage's script."""
    data = folder / "data"
    if stage == "data":
        return [str(data)]
    if stage == "base":
        return [str(folder / "base"), "--data", str(data / "corpus.jsonl")]
    pairs = ["--data", str(data / "pairs.jsonl"), "--heldout-data", str(data / "pairs_heldout.jsonl")]
    return [str(folder / "base"), str(folder / "reward"), *pairs]


def train(
    console: Console, folder: Path, steps: int
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """Stage 3: the summary, samples by policy, and metrics by policy."""
    for stale in ("runs", "adapters", "port", "interactive.jsonl"):
        path = folder / stale
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with Children(folder / "logs") as children:
        address = serve(console, children, folder)
        asker = children.start(
            "interactive", [sys.executable, str(HERE / "interactive.py"), address, str(folder / "interactive.jsonl")]
        )
        trainers = {name: children.start(name, train_command(folder, address, name, steps)) for name in DIRECTIONS}
        with Live(console=console, refresh_per_second=4) as live:
            for trainer in trainers.values():
                children.wait(trainer, lambda: live.update(progress(folder)))
            live.update(progress(folder))
        with connect(address) as client:
            status = client.status()
        asker.stop()
    runs = {name: read_jsonl(folder / "runs" / name / "metrics.jsonl") for name in DIRECTIONS}
    ended = {name: json.loads((folder / "runs" / name / "summary.json").read_text("utf-8")) for name in DIRECTIONS}
    waits = [line["ms"] for line in read_jsonl(folder / "interactive.jsonl")]
    summary = {
        "policies": {
            name: {
                "reward_before": run["scores_before"][REWARD],
                "reward_after": run["scores_after"][REWARD],
                **{key: run[key] for key in ("reward_std_before", "kl", "steps", "adapter_version")},
            }
            for name, run in ended.items()
        },
        "reward_model": {"pair_accuracy": read_record(folder / "reward")["pair_accuracy"]},
        "interactive_reward": {
            "count": len(waits),
            "p50_ms": quantile(waits, 0.5),
            "p95_ms": quantile(waits, 0.95),
        },
        "server": {
            "peak_rss_bytes": status.peak_rss_bytes,
            "base_bytes": status.base_bytes,
            "adapter_bytes": {adapter.name: adapter.total_bytes for adapter in status.adapters},
        },
    }
    return summary, {name: raw_samples(run, DIRECTIONS[name]) for name, run in ended.items()}, runs


def raw_samples(run: dict[str, Any], direction: float) -> list[dict[str, Any]]:
    """A run's samples with the reward model's own scores: a run's rewards are weighted."""
    keys = ("reward_before", "reward_after")
    return [{**sample, **{key: direction * sample[key] for key in keys}} for sample in run["samples"]]


def serve(console: Console, children: Children, folder: Path) -> str:
    """Starts the server; its address."""
    port = folder / "port"
    command = ["serve", str(folder / "base"), "--reward", f"{REWARD}={folder / 'reward'}", "--threads", "1"]
    command += ["--root", str(folder / "adapters"), "--port", "0", "--port-file", str(port)]
    server = children.start("server", onebase(*command))
    with console.status("Stage 3: starting the server …"):
        while not (port.exists() and port.read_text("utf-8").strip()):
            server.running()
            time.sleep(0.1)
    address = f"127.0.0.1:{port.read_text('utf-8').strip()}"
    console.print(f"Stage 3: one server on {address}, two trainings, and questions to the reward model")
    return address


def train_command(folder: Path, address: str, name: str, steps: int) -> list[str]:
    """`onebase train` for one policy."""
    flags = ["--server", address, "--output_dir", str(folder / "runs" / name), "--resume", "never"]
    flags += ["--prompts.path", str(folder / "data" / "prompts.jsonl")]
    flags += ["--eval_prompts.path", str(folder / "data" / "prompts_heldout.jsonl")]
    return onebase("train", str(HERE / f"{name}.yaml"), *flags, *(["--steps", str(steps)] if steps else []))


def progress(folder: Path) -> Table:
    """How far both trainings are, and what the questions cost."""
    table = Table(title="Training")
    for column in ("policy", "step", "reward", "KL", "entropy", "seconds a step"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name in DIRECTIONS:
        path = folder / "runs" / name / "metrics.jsonl"
        rows = [row for row in (read_jsonl(path) if path.exists() else []) if row["step"]]
        if not rows:
            table.add_row(name, "…", "", "", "", "")
            continue
        row = rows[-1]
        numbers = (row[f"reward/{REWARD}"], row["objective/kl"], row["ppo/policy/entropy"], row["seconds"])
        table.add_row(name, str(row["step"]), *(f"{number:+.2f}" for number in numbers))
    path = folder / "interactive.jsonl"
    waits = [line["ms"] for line in (read_jsonl(path) if path.exists() else [])]
    if waits:
        table.caption = (
            f"{len(waits)} questions to the reward model, half of them answered in {quantile(waits, 0.5):.0f} ms"
        )
    return table


def onebase(*words: str) -> list[str]:
    """The `onebase` command of this environment."""
    return [sys.executable, "-m", "onebase.client.cli", *words]


def digest(names: list[str]) -> str:
    """SHA-256 of some of this folder's files."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in names)).hexdigest()


def last_line(path: Path) -> str:
    """The newest line of a log, shortened."""
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    return " ".join(lines[-12:])[-90:].replace("[", "(")


if __name__ == "__main__":
    typer.run(main)
