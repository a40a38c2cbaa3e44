"""TRL's current trainers (GRPO, RLOO, SFT, DPO), run unmodified on fixed completions and scores, and watched.

Run by `make oracle` after generate.py, whose base and policy they train, in the environment of the tests: that is where
the current TRL is.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from peft import PeftModel, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402
from trl.trainer import grpo_trainer, rloo_trainer, utils  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
EOS, FIRST_WORD, VOCABULARY = 2, 4, 120  # as generate_models.py has them
MAX_NEW_TOKENS = 16
GENERATIONS = 4
PROMPT_LENGTHS = (3, 6)
RESPONSE_LENGTHS = (5, 9, 3, 12, 1, 7, 10, 4)

CONDITION = 2e-6
"""The most by which float32 and float64 may differ in the weights: see generate_ppo.py, where it is padding sides."""

COMMON: dict[str, Any] = {
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "learning_rate": 1e-3,
    "max_grad_norm": 1e9,
}


@dataclass(frozen=True)
class Scenario:
    """One training: batches of completions, and the keys of TRL's config that differ from COMMON and from its own."""

    name: str
    steps: int = 2
    mini_batch_size: int = 8
    config: dict[str, Any] = field(default_factory=dict)


GRPO = (
    Scenario("grpo_defaults", steps=1),
    Scenario(
        "grpo_loop",
        mini_batch_size=4,
        config={"loss_type": "grpo", "beta": 0.1, "epsilon": 0.02, "epsilon_high": 0.05, "num_iterations": 2},
    ),
    Scenario(
        "grpo_dapo_accumulated",
        mini_batch_size=2,
        config={
            "loss_type": "dapo",
            "beta": 0.05,
            "scale_rewards": "batch",
            "num_iterations": 2,
            "epsilon": 0.05,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
        },
    ),
    Scenario("grpo_bnpo", mini_batch_size=4, config={"loss_type": "bnpo", "beta": 0.2, "num_iterations": 2}),
    Scenario("grpo_dr", mini_batch_size=4, config={"loss_type": "dr_grpo", "scale_rewards": "none"}),
)
RLOO = (
    Scenario("rloo_defaults", steps=1),
    Scenario("rloo_loop", mini_batch_size=4, config={"beta": 0.2, "num_iterations": 2, "epsilon": 0.05}),
    Scenario(
        "rloo_accumulated",
        mini_batch_size=2,
        config={
            "normalize_advantages": True,
            "num_iterations": 2,
            "epsilon": 0.02,
            "epsilon_high": 0.04,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
        },
    ),
)
UNLIKE_DEFAULTS: dict[str, dict[str, Any]] = {"grpo": {"use_bias_correction_kl": False}, "rloo": {}}
"""What a stepper of ours does not have: its KL penalty is the paper's, with TRL's newer factor left out."""
OURS = {  # what of TRL's configs a stepper of ours is told
    "grpo": ("beta", "loss_type", "scale_rewards"),
    "rloo": ("beta", "normalize_advantages"),
}
SHARED = ("num_iterations", "epsilon", "epsilon_high", "gradient_accumulation_steps", "learning_rate", "max_grad_norm")


def watched(trainer_class: type) -> type:
    """The trainer with completions given to it, and its losses and advantages kept; it computes them itself."""

    class Watched(trainer_class):  # type: ignore[misc]
        completions: list[list[list[int]]]
        losses: list[float]
        advantages: list[list[float]]

        def _generate_single_turn(self, prompt_ids: Any, *_: Any) -> Any:
            completions = self.completions.pop(0)
            assert len(prompt_ids) == len(completions)
            return (completions, None) if trainer_class is trl.GRPOTrainer else completions

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            self.advantages.append(output["advantages"].tolist())
            return output

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            divided = self.current_gradient_accumulation_steps if trainer_class is trl.GRPOTrainer else 1
            self.losses.append(float(loss) * divided)
            return loss

    return Watched


def policy(dtype: torch.dtype) -> tuple[Any, Any]:
    """The policy that trainings begin with, and its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained("base", dtype=dtype)
    return PeftModel.from_pretrained(base, "policy", is_trainable=True).to(dtype), AutoTokenizer.from_pretrained("base")


def random_ids(generator: random.Random, length: int) -> list[int]:
    """Ordinary words: no special token."""
    return [generator.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]


def words(ids: list[int]) -> str:
    """The text of ordinary words."""
    return " ".join(f"w{token}" for token in ids)


def group_oracle(algorithm: str, scenario: Scenario) -> None:
    """Writes `<scenario>.json` and, with the weights after it, `<scenario>.safetensors`."""
    record, weights = _train_on_groups(algorithm, scenario, torch.float32)
    _, control = _train_on_groups(algorithm, scenario, torch.float64)
    _write(scenario.name, record, weights, control)


def _train_on_groups(algorithm: str, scenario: Scenario, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    trainer_class, config_class = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[algorithm]
    generator = random.Random(scenario.name)
    size = len(RESPONSE_LENGTHS)
    steps = [_batch(generator) for _ in range(scenario.steps)]
    prompts = [{"prompt": words(query)} for step in steps for query in step.pop("prompts")]
    scores = [list(step["scores"]) for step in steps]
    model, tokenizer = policy(dtype)
    with tempfile.TemporaryDirectory() as folder:
        iterations = scenario.config.get("num_iterations", 1)
        accumulated = scenario.config.get("gradient_accumulation_steps", 1)
        passes = size // scenario.mini_batch_size
        config = config_class(
            output_dir=folder,
            per_device_train_batch_size=scenario.mini_batch_size,
            steps_per_generation=passes,
            num_generations=GENERATIONS,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=scenario.steps * iterations * passes // accumulated,
            shuffle_dataset=False,
            **{**COMMON, **UNLIKE_DEFAULTS[algorithm], **scenario.config},
        )
        trainer = watched(trainer_class)(
            model=model,
            args=config,
            reward_funcs=lambda completions, **_: scores.pop(0),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        if config.beta:
            trainer.model.delete_adapter("ref")  # a copy of the policy: without it the reference is the base
        trainer.completions = [step["responses"] for step in steps]
        trainer.losses, trainer.advantages = [], []
        orders: list[list[int]] = []
        with mock.patch.object(_module(algorithm), "shuffle_sequence_dict", _recorded_shuffle(orders, size)):
            trainer.train()
    per_step = len(trainer.losses) // scenario.steps
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(orders) == scenario.steps
    assert scores == trainer.completions == []
    for index, step in enumerate(steps):
        updates = slice(index * len(logs) // scenario.steps, (index + 1) * len(logs) // scenario.steps)
        step |= {
            "permutations": [orders[index]] * iterations,
            "advantages": trainer.advantages[index],
            "losses": trainer.losses[index * per_step : (index + 1) * per_step],
            "entropy": _mean(logs[updates], "entropy"),
            "clip_ratio": _mean(logs[updates], "clip_ratio/region_mean"),
        }
    settings = {name: getattr(config, name) for name in (*SHARED, *OURS[algorithm])}
    settings |= {"batch_size": size, "mini_batch_size": scenario.mini_batch_size, "num_generations": GENERATIONS}
    weights = get_peft_model_state_dict(trainer.model)
    return {"trl": trl.__version__, "max_new_tokens": MAX_NEW_TOKENS, "config": settings, "steps": steps}, weights


def _batch(generator: random.Random) -> dict[str, Any]:
    """Completions of two prompts with their scores; queries begin with the token that begins texts."""
    prompts = [random_ids(generator, length) for length in PROMPT_LENGTHS]
    responses = [random_ids(generator, length) for length in RESPONSE_LENGTHS]
    responses[1][-1] = EOS
    return {
        "prompts": prompts,
        "queries": [[1, *prompt] for prompt in prompts for _ in range(GENERATIONS)],
        "responses": responses,
        "scores": [round(generator.gauss(0.5, 1.5), 3) for _ in responses],
    }


def _module(algorithm: str) -> Any:
    return {"grpo": grpo_trainer, "rloo": rloo_trainer}[algorithm]


def _recorded_shuffle(orders: list[list[int]], size: int) -> Any:
    """TRL's own shuffle, and the order that it takes."""

    def shuffle(batch: Any) -> Any:
        state = torch.get_rng_state()
        orders.append(torch.randperm(size).tolist())
        torch.set_rng_state(state)
        return utils.shuffle_sequence_dict(batch)

    return shuffle


def _mean(logs: list[dict[str, float]], name: str) -> float:
    return sum(log[name] for log in logs) / len(logs)


def sft_oracle(name: str, accumulated: int) -> None:
    """Three steps of SFTTrainer on eight prompts with completions, likewise."""
    record, weights = _train_on_rows(name, accumulated, torch.float32)
    _, control = _train_on_rows(name, accumulated, torch.float64)
    _write(name, record, weights, control)


def _train_on_rows(name: str, accumulated: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    generator = random.Random(name)
    rows = [
        (random_ids(generator, 2 + index % 3), random_ids(generator, n)) for index, n in enumerate(RESPONSE_LENGTHS)
    ]
    model, tokenizer = policy(dtype)
    with tempfile.TemporaryDirectory() as folder:
        mini_batch_size = len(rows) // accumulated
        config = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=mini_batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=3,
            **{**COMMON, "max_grad_norm": 1.0},
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": words(prompt) + " ", "completion": words(answer)} for prompt, answer in rows]
            ),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    record = {
        "trl": trl.__version__,
        "config": {
            "batch_size": len(rows),
            "mini_batch_size": mini_batch_size,
            "learning_rate": config.learning_rate,
            "max_grad_norm": config.max_grad_norm,
        },
        "prompts": [words(prompt) for prompt, _ in rows],
        "completions": [words(answer) for _, answer in rows],
        "tokens": [[*answer, EOS] for _, answer in rows],
        "losses": [log["loss"] for log in logs],
        "grad_norms": [log["grad_norm"] for log in logs],
    }
    return record, get_peft_model_state_dict(trainer.model)


def dpo_oracle(name: str, accumulated: int) -> None:
    """Three steps of DPOTrainer on four prompts with two completions each, likewise."""
    record, weights = _train_on_pairs(name, accumulated, torch.float32)
    _, control = _train_on_pairs(name, accumulated, torch.float64)
    _write(name, record, weights, control)


def _train_on_pairs(name: str, accumulated: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    generator = random.Random(name)
    pairs = list(zip(RESPONSE_LENGTHS[::2], RESPONSE_LENGTHS[1::2], strict=True))
    rows = [[random_ids(generator, length) for length in (3, *lengths)] for lengths in pairs]
    model, tokenizer = policy(dtype)
    with tempfile.TemporaryDirectory() as folder:
        mini_batch_size = len(rows) // accumulated
        config = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=mini_batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=3,
            beta=0.3,
            **{**COMMON, "max_grad_norm": 1.0},
        )
        columns = [
            {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected)}
            for prompt, chosen, rejected in rows
        ]
        trainer = trl.DPOTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(columns), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model.delete_adapter("ref")  # a copy of the policy: without it the reference is the base
        trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    record = {
        "trl": trl.__version__,
        "config": {
            "batch_size": len(rows),
            "mini_batch_size": mini_batch_size,
            "learning_rate": config.learning_rate,
            "max_grad_norm": config.max_grad_norm,
            "beta": config.beta,
        },
        "prompts": [words(row[0]) for row in rows],
        "chosen": [words(row[1]) for row in rows],
        "rejected": [words(row[2]) for row in rows],
        "losses": [log["loss"] for log in logs],
        "grad_norms": [log["grad_norm"] for log in logs],
    }
    return record, get_peft_model_state_dict(trainer.model)


def _write(name: str, record: dict[str, Any], weights: dict[str, Any], control: dict[str, Any]) -> None:
    differences = {key: float((weights[key] - control[key]).abs().max() / weights[key].abs().max()) for key in weights}
    worst = max(differences, key=differences.__getitem__)
    print(f"{name}: float32 is float64 to {differences[worst]:.1e} ({worst})")
    if differences[worst] > CONDITION:
        raise SystemExit(f"{name}: the weights are not determined to {CONDITION:g}; take another seed")
    Path(f"{name}.json").write_text(json.dumps(record) + "\n")
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in weights.items()}, f"{name}.safetensors")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)
    os.chdir(FIXTURES)
    for algorithm, scenarios in (("grpo", GRPO), ("rloo", RLOO)):
        for scenario in scenarios:
            group_oracle(algorithm, scenario)
    sft_oracle("sft_steps", accumulated=1)
    sft_oracle("sft_accumulated", accumulated=2)
    dpo_oracle("dpo_steps", accumulated=1)
    dpo_oracle("dpo_accumulated", accumulated=2)


if __name__ == "__main__":
    main()
