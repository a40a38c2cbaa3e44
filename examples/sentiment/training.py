"""What the two stages that train with TRL share: where rows come from, the common settings, and the progress shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import read_jsonl
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

CPU_SETTINGS: dict[str, Any] = {
    "bf16": False,  # float32 throughout: the server holds the base in the dtype it was saved in
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
}
"""Settings of TRL's trainers for a small model on a CPU."""


def prepare(threads: int, seed: int) -> None:
    """Sets torch's threads and every seed, and leaves the screen to PrintProgress.

    One thread is the default: a second one makes the small Llama 1.6 times as fast on an idle machine, but where
    another process wants that core, two threads wait for each other and take two to four times as long.
    """
    torch.set_num_threads(threads)
    set_seed(seed)
    disable_progress_bars()
    disable_progress_bar()


def load_rows(source: str, split: str) -> Dataset:
    """The rows of a JSON Lines file, or of a split of a data set on the hub."""
    if source.endswith(".jsonl"):
        return Dataset.from_list(read_jsonl(Path(source)))
    return load_dataset(source, split=split)


class PrintProgress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Prints a line per log: step, loss, and whichever of `keys` the trainer logs."""

    def __init__(self, *keys: str) -> None:
        self._keys = ("loss", *keys)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Called by the trainer."""
        shown = [f"{key} {float(logs[key]):.3f}" for key in self._keys if logs and key in logs]
        if shown:
            print(f"step {state.global_step}/{state.max_steps}", *shown, sep="  ", flush=True)
