"""Asks the reward model about two answers to a prompt, again and again, and notes how long each answer took.

    python examples/sentiment/interactive.py 127.0.0.1:7070 .demo/interactive.jsonl

This is the person who pokes at the reward model while others train. Ends at SIGTERM.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from reviews import pairs

from onebase.client import Sequence, connect


def main(
    server: Annotated[str, typer.Argument(help="Address of the server.")],
    output: Annotated[Path, typer.Argument(help="Where a JSON line for each question goes.")],
    adapter: Annotated[str, typer.Option(help="The reward adapter to ask.")] = "sentiment",
    every: Annotated[float, typer.Option(help="Seconds between questions.")] = 0.5,
) -> None:
    """Asks until it is told to stop."""
    asking = True

    def stop(*_: object) -> None:
        nonlocal asking
        asking = False

    signal.signal(signal.SIGTERM, stop)
    questions = pairs(4242, 200, held_out=True)
    chance = random.Random(0)
    with connect(server) as client, output.open("w", encoding="utf-8", buffering=1) as out:
        while asking:
            question = chance.choice(questions)
            began = time.perf_counter()
            good, bad = client.reward(
                [Sequence(question["prompt"], question[side]) for side in ("chosen", "rejected")], adapter
            )
            milliseconds = 1000 * (time.perf_counter() - began)
            line = {"ms": milliseconds, "prompt": question["prompt"], "chosen": good.score, "rejected": bad.score}
            out.write(json.dumps(line) + "\n")
            time.sleep(every)


if __name__ == "__main__":
    typer.run(main)
