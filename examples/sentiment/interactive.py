"""A third process that asks the reward model questions while others train, and writes down how long each took.

    python examples/sentiment/interactive.py .demo/interactive.jsonl --server 127.0.0.1:7070

A question is a prompt with two responses, as `onebase reward PROMPT RESPONSE RESPONSE` would ask it; one client lives
through all of them, so that no interpreter's start is measured. It goes on until SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from onebase.client import Sequence, connect

QUESTIONS = [
    ("I watched this comedy last night with my sister.", " The jokes were wonderful.", " The jokes were terrible."),
    ("My boss showed me this drama on Sunday.", " I want my money back.", " I would watch it again."),
    ("I saw this western at home this morning.", " The plot was never dull.", " The plot was never good."),
    ("This is a thriller about a king who finds a map.", " It was nice, but slow.", " It was slow, but nice."),
]


def main(
    output: Annotated[Path, typer.Argument(help="JSON Lines file for questions, scores and latencies.")],
    server: Annotated[str, typer.Option(help="Where `onebase serve` listens.")] = "127.0.0.1:7070",
    adapter: Annotated[str, typer.Option(help="The reward adapter to ask.")] = "sentiment",
    every: Annotated[float, typer.Option(help="Seconds from one question to the next.", min=0)] = 1.0,
) -> None:
    """Asks until it is told to stop."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopping.set())
    output.parent.mkdir(parents=True, exist_ok=True)
    with connect(server) as client, output.open("w", encoding="utf-8") as file:
        for prompt, *responses in itertools.cycle(QUESTIONS):
            began = time.perf_counter()
            rewards = client.reward([Sequence(prompt, response) for response in responses], adapter)
            milliseconds = 1000 * (time.perf_counter() - began)
            scores = {response: reward.score for response, reward in zip(responses, rewards, strict=True)}
            file.write(json.dumps({"prompt": prompt, "scores": scores, "ms": milliseconds}) + "\n")
            file.flush()
            if stopping.wait(every):
                return


if __name__ == "__main__":
    typer.run(main)
