"""Stage 2: a reward adapter on the base of stage 1, with TRL's RewardTrainer and PEFT, from preference pairs.

    python examples/sentiment/stage2_reward.py .demo/base .demo/reward
    python examples/sentiment/stage2_reward.py MODEL reward --data DATASET --heldout-data "" --learning-rate 1e-4

A pair has "chosen" and "rejected", and may have the "prompt" that both follow. RewardTrainer scores text + EOS.
Writes the adapter in PEFT's format, score head included, to OUTPUT, and its held-out pair accuracy to OUTPUT.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from common import record_path, write_json
from peft import LoraConfig, TaskType
from training import CPU_SETTINGS, PrintProgress, load_rows, prepare
from transformers import AutoTokenizer, PrinterCallback
from trl import RewardConfig, RewardTrainer


def main(
    base: Annotated[str, typer.Argument(help="Directory of the base, or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory for the adapter.")],
    data: Annotated[str, typer.Option(help="A JSON Lines file of pairs, or a hub id.")] = ".demo/data/pairs.jsonl",
    heldout_data: Annotated[
        str, typer.Option(help="Pairs to judge by, likewise; empty keeps 400 of --data for that.")
    ] = ".demo/data/pairs_heldout.jsonl",
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    rank: Annotated[int, typer.Option(help="LoRA rank; alpha is twice as much.")] = 8,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Pairs per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak rate; use 1e-4 or so for a large base.")] = 3e-3,
    max_length: Annotated[int, typer.Option(help="Pairs with a longer text, in tokens, are left out.")] = 128,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
) -> None:
    """Trains the reward adapter."""
    began = time.monotonic()
    record_path(output).unlink(missing_ok=True)
    prepare(threads, seed)
    rows = load_rows(data, split)
    if heldout_data:
        heldout = load_rows(heldout_data, split)
    else:
        parts = rows.train_test_split(test_size=400, seed=seed)
        rows, heldout = parts["train"], parts["test"]
    settings = RewardConfig(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=20,  # a divisor of 400, since TRL averages accuracy over batches
        learning_rate=learning_rate,
        warmup_steps=0.1,
        max_length=max_length,
        center_rewards_coefficient=0.01,  # pairs leave the zero open; this puts it between chosen and rejected
        seed=seed,
        **CPU_SETTINGS,
    )
    trainer = RewardTrainer(
        model=base,
        args=settings,
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS,  # without it no head would be saved
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            modules_to_save=["score"],
        ),
        callbacks=[PrintProgress("accuracy", "margin")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    measured = trainer.evaluate()
    trainer.model.save_pretrained(output)
    record = {
        "pair_accuracy": round(float(measured["eval_accuracy"]), 6),
        "margin": float(measured["eval_margin"]),
        "heldout_pairs": len(heldout),
        "seconds": time.monotonic() - began,
    }
    write_json(record_path(output), record)
    print(f"held-out pair accuracy {record['pair_accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
