"""TRL 0.11.4's multi-adapter PPO as a peer: one iteration for every line on stdin, then a line of JSON on stdout.

Runs in an environment of its own (`make bench-peers`). An iteration is what TRL's documentation shows: generate, the
rewards by compute_reward_score on the same base, PPOTrainer.step.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def arguments() -> argparse.Namespace:
    """What onebase_ppo.py is given too."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "reward", "prompts"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("batch", "mini", "epochs", "new", "rank", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    return parser.parse_args()


class Run:
    """One policy in training."""

    def __init__(self, given: argparse.Namespace) -> None:
        torch.manual_seed(given.seed)
        self._given = given
        self._random = random.Random(given.seed)
        self._tokenizer = AutoTokenizer.from_pretrained(given.base)
        lora = LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules=given.targets, task_type="CAUSAL_LM")
        self._model = AutoModelForCausalLMWithValueHead.from_pretrained(
            given.base, peft_config=lora, reward_adapter=given.reward
        )
        config = PPOConfig(
            batch_size=given.batch,
            mini_batch_size=given.mini,
            ppo_epochs=given.epochs,
            learning_rate=1e-4,
            seed=given.seed,
        )
        self._trainer = PPOTrainer(config, self._model, ref_model=None, tokenizer=self._tokenizer)
        lines = Path(given.prompts).read_text(encoding="utf-8").splitlines()
        self._prompts = [json.loads(line)["prompt"] for line in lines]

    def iterate(self) -> None:
        """Generates, judges and trains once."""
        given, tokenizer = self._given, self._tokenizer
        queries = [torch.tensor(ids) for ids in self._random.sample(self._prompts, given.batch)]
        responses = self._trainer.generate(
            queries,
            batch_size=given.batch,
            return_prompt=False,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=given.new,
            max_new_tokens=given.new,
            pad_token_id=tokenizer.pad_token_id,
        )
        whole = [torch.cat(pair).tolist() for pair in zip(queries, responses, strict=True)]
        padded = tokenizer.pad({"input_ids": whole}, return_tensors="pt")
        scores = self._model.compute_reward_score(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
        )
        last = padded["attention_mask"].sum(1) - 1
        self._trainer.step(queries, responses, [scores[row, last[row], 0] for row in range(given.batch)])


def main() -> None:
    """Iterates until there are no more lines."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run = Run(arguments())
    print(json.dumps({"wall": 0.0, "cpu": 0.0}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        run.iterate()
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    main()
