"""Stages 1 and 2 as the demo runs them: in a process of their own, and only if their output is not there yet.

A stage's output is known again by a fingerprint of everything that made it: its arguments, its source files, and the
fingerprints of the stages it stands on. The fingerprint is written into the stage's record when it has ended well.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import read_record, record_path, write_json
from processes import Children
from rich.console import Console

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """A script that makes an output directory and a record next to it."""

    title: str
    output: Path
    script: Path
    arguments: tuple[str, ...]
    sources: tuple[Path, ...] = ()
    """Other files that the script is made of."""
    needs: tuple[Stage, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.arguments).encode())
        for source in (self.script, *self.sources):
            digest.update(hashlib.sha256(source.read_bytes()).digest())
        for stage in self.needs:
            digest.update(stage.fingerprint().encode())
        return digest.hexdigest()

    @property
    def is_done(self) -> bool:
        """Whether the output is there and is what this stage would make."""
        return self.output.is_dir() and read_record(self.output).get("fingerprint") == self.fingerprint()


def demo_stages(root: Path) -> tuple[Stage, ...]:
    """Data, base and reward adapter under `root`."""
    shared = (HERE / "common.py", HERE / "training.py")
    data = Stage(
        "data",
        root / "data",
        HERE / "reviews.py",
        (str(root / "data"),),
        (HERE / "vocabulary.py", HERE / "common.py"),
    )
    base = Stage(
        "stage 1: a base from scratch, with SFTTrainer",
        root / "base",
        HERE / "stage1_sft.py",
        (str(root / "base"), "--data", str(root / "data" / "corpus.jsonl")),
        shared,
        (data,),
    )
    pairs, heldout = (str(root / "data" / name) for name in ("pairs.jsonl", "pairs_heldout.jsonl"))
    reward = Stage(
        "stage 2: a reward adapter, with RewardTrainer",
        root / "reward",
        HERE / "stage2_reward.py",
        (str(root / "base"), str(root / "reward"), "--data", pairs, "--heldout-data", heldout),
        shared,
        (data, base),
    )
    return data, base, reward


def run_stage(stage: Stage, children: Children, console: Console) -> None:
    """Runs a stage, unless its output is there already.

    Raises:
        ChildFailed: it ended with an error.
    """
    if stage.is_done:
        console.print(f"[dim]✓ {stage.title}: kept in {stage.output}[/]")
        return
    began = time.monotonic()
    child = children.start(stage.output.name, [sys.executable, str(stage.script), *stage.arguments])
    with console.status(stage.title) as status:
        while child.running:
            progress = [line for line in child.tail() if line.startswith("step ")]
            status.update(f"{stage.title}  [dim]{progress[-1] if progress else ''}[/]")
            time.sleep(0.2)
    children.check()
    record = read_record(stage.output)
    if not record:
        raise child.failure(f"wrote no {record_path(stage.output)}")
    write_json(record_path(stage.output), record | {"fingerprint": stage.fingerprint()})
    console.print(f"✓ {stage.title}: {time.monotonic() - began:.0f} s")
