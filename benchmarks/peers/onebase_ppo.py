"""onebase's trainer as a peer: one PPO iteration for every line on stdin, and then a line of JSON on stdout.

It is `onebase train` itself, stopped between its steps. What the server spends is not in its numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from rich.console import Console

from onebase.trainer import (
    EvalConfig,
    GenerationConfig,
    LogConfig,
    PolicyConfig,
    PpoConfig,
    PromptsConfig,
    RewardTerm,
    TrainConfig,
    train,
)
from onebase.trainer.display import PlainDisplay

ENDLESS = 10**6


class Between:
    """Asked by the trainer before each step whether to stop: tells what the last one cost and waits for a line."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None

    def __call__(self) -> bool:
        """True when there are no more lines."""
        now = time.perf_counter(), time.process_time()
        began = self._began or now
        print(json.dumps({"wall": now[0] - began[0], "cpu": now[1] - began[1]}), flush=True)
        stop = not sys.stdin.readline()
        self._began = time.perf_counter(), time.process_time()
        return stop


def main() -> None:
    """Trains as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("server", "policy", "reward", "prompts", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("batch", "mini", "epochs", "new", "rank", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    given = parser.parse_args()
    config = TrainConfig(
        prompts=PromptsConfig(given.prompts),
        server=given.server,
        policy=PolicyConfig(
            given.policy, rank=given.rank, alpha=2.0 * given.rank, target_modules=tuple(given.targets), seed=given.seed
        ),
        eval=EvalConfig(samples=0),
        rewards=(RewardTerm(given.reward),),
        append_eos=False,
        generation=GenerationConfig(max_new_tokens=given.new, min_new_tokens=given.new),
        ppo=PpoConfig(batch_size=given.batch, mini_batch_size=given.mini, ppo_epochs=given.epochs, learning_rate=1e-4),
        steps=ENDLESS,
        seed=given.seed,
        output_dir=given.output,
        resume="never",
        log=LogConfig(tensorboard=False, samples=0),
    )
    train(config, display=PlainDisplay(Console(stderr=True)), stop=Between())


if __name__ == "__main__":
    main()
