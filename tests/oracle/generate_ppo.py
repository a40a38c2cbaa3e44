"""PPOTrainer.step of TRL 0.11.4, run unmodified and watched: what went in, what it made of it, what came out."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from generate_models import EOS
from generate_scores import load_policy, numbers, random_ids
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer
from trl import PPOConfig, PPOTrainer
from trl.core import masked_mean
from trl.trainer.utils import RunningMoments

QUERY_LENGTHS = (2, 3, 5, 4, 8, 6, 2, 7)
RESPONSE_LENGTHS = (5, 9, 3, 12, 1, 7, 10, 4)
"""Ragged, with the shortest response there can be; its one token has no next value and no later reward."""

CONDITION = 1e-6
"""The most by which right and left padding may differ in the weights, relative to a tensor's largest magnitude.

Adam's first update is lr·g/(|g| + eps): where |g| is near eps, the last digits of g decide the update, and no two
programs agree. TRL itself is asked twice, and a scenario in which it disagrees with itself is refused: the tests then
compare at 1e-5 because the numbers are well determined, not because luck was on their side.
"""


@dataclass(frozen=True)
class Scenario:
    """One training, by the keys of PPOConfig that differ from TRL's defaults."""

    name: str
    steps: int = 1
    clip_every_update: bool = False
    """TRL clips only once, because it keeps its parameters in an iterator; a list there makes it clip each time."""
    padded: bool = True
    """Whether rows differ in length."""
    config: dict[str, Any] = field(default_factory=dict)


ONE_UPDATE = {"ppo_epochs": 1, "mini_batch_size": 8}
FOUR_UPDATES = {"ppo_epochs": 2, "mini_batch_size": 4}
# The KL's error is clipped in ppo_loop, whose target is far from it, and not here, where it is near.
ADAPTIVE = {"target": 4.0, "horizon": 100, "kl_penalty": "mse"}
OTHER = {"gamma": 0.95, "lam": 0.8, "cliprange": 0.02, "cliprange_value": 0.05, "vf_coef": 0.5, "init_kl_coef": 0.05}
SCALED = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 1.0}

SCENARIOS = (
    Scenario("ppo_step", config=ONE_UPDATE),
    Scenario("ppo_skipped", config={**ONE_UPDATE, "ratio_threshold": 0.5}),
    Scenario("ppo_loop", steps=2, config={**FOUR_UPDATES, "target": 1.0, "horizon": 100}),
    # Some updates are over the norm and some below: Adam would not notice if all of them were scaled alike.
    Scenario("ppo_loop_clipped", steps=2, clip_every_update=True, config={**FOUR_UPDATES, "max_grad_norm": 1.5}),
    Scenario("ppo_loop_accumulated", steps=2, config={**FOUR_UPDATES, "gradient_accumulation_steps": 2}),
    Scenario("ppo_other_settings", steps=2, config={**FOUR_UPDATES, **OTHER, **ADAPTIVE}),
    Scenario(
        "ppo_scaled_scores", steps=2, config={**FOUR_UPDATES, **SCALED, "kl_penalty": "abs", "adap_kl_ctrl": False}
    ),
    # TRL whitens rewards without masking the result, so that padding after a response becomes reward of the response;
    # its whitening is determined only where nothing is padded.
    Scenario("ppo_whitened_rewards", padded=False, config={**FOUR_UPDATES, "whiten_rewards": True}),
    Scenario("ppo_early_stop", config={**FOUR_UPDATES, "early_stopping": True, "target_kl": 1e-6}),
)

SETTINGS = (
    *("learning_rate", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "max_grad_norm"),
    *("adap_kl_ctrl", "init_kl_coef", "kl_penalty", "target", "horizon", "gamma", "lam", "whiten_rewards"),
    *("cliprange", "cliprange_value", "vf_coef", "ratio_threshold", "early_stopping", "target_kl"),
    *("use_score_scaling", "use_score_norm", "score_clip"),
)


class WatchedTrainer(PPOTrainer):
    """PPOTrainer that keeps what its own methods take and give; it changes none of it."""

    def watch(self) -> None:
        self.batch: dict[str, Any] = {}
        self.minibatches: list[dict[str, Any]] = []

    def compute_rewards(self, scores: Any, logprobs: Any, ref_logprobs: Any, masks: Any) -> Any:
        result = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        self.batch |= _ragged(masks, old_logprobs=logprobs, reference_logprobs=ref_logprobs, rewards=result[0])
        self.batch["kl_coef"] = float(self.kl_ctl.value)
        return result

    def compute_advantages(self, values: Any, rewards: Any, mask: Any) -> Any:
        result = super().compute_advantages(values, rewards, mask)
        self.batch |= _ragged(mask, old_values=result[0], advantages=result[1], returns=result[2])
        return result

    def loss(self, old: Any, values: Any, logits: Any, vpreds: Any, logprobs: Any, mask: Any, *rest: Any) -> Any:
        result = super().loss(old, values, logits, vpreds, logprobs, mask, *rest)
        metrics = {key: float(value) for key, value in result[2].items() if value.numel() == 1}
        metrics["policy/ratio"] = float(masked_mean(torch.exp(logprobs - old), mask))
        self.minibatches.append({"metrics": metrics, **_ragged(mask, logprobs=logprobs, values=vpreds)})
        return result

    def watch_gradients(self) -> None:
        backward = self.accelerator.backward

        def measured(loss: torch.Tensor) -> None:
            backward(loss)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.minibatches[-1]["grad_norm"] = float(torch.nn.utils.get_total_norm(gradients))

        self.accelerator.backward = measured


class TensorMoments:
    """TRL's RunningMoments, with mean and std as the tensors that PPOTrainer.step calls `.to` on.

    TRL 0.11.4 keeps floats there, so its score scaling ends in an AttributeError; the numbers are its own.
    """

    def __init__(self, moments: RunningMoments) -> None:
        self.update = moments.update
        self._moments = moments

    @property
    def mean(self) -> torch.Tensor:
        return torch.tensor(self._moments.mean)

    @property
    def std(self) -> torch.Tensor:
        return torch.tensor(self._moments.std)


def _ragged(mask: torch.Tensor, **arrays: torch.Tensor) -> dict[str, Any]:
    """The entries that count, row by row: one number per response token."""
    return {
        name: [numbers(row[kept.bool()]) for row, kept in zip(array, mask, strict=True)]
        for name, array in arrays.items()
    }


def ppo_oracle(base: str, policy: str, scenario: Scenario) -> None:
    """Writes `<scenario>.json` and, with the weights after it, `<scenario>.safetensors`."""
    record, weights = _train(base, policy, scenario, padding_side="right")
    _, control = _train(base, policy, scenario, padding_side="left")
    differences = {name: _relative(weights[name], control[name]) for name in weights}
    worst = max(differences, key=differences.__getitem__)
    if differences[worst] > CONDITION:
        raise SystemExit(f"{scenario.name}: {worst} is determined to {differences[worst]:.1e} only; take another seed")
    print(f"{scenario.name}: TRL agrees with itself to {differences[worst]:.1e} ({worst})")
    Path(f"{scenario.name}.json").write_text(json.dumps(record) + "\n")
    save_file(weights, f"{scenario.name}.safetensors")


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def _train(base: str, policy: str, scenario: Scenario, padding_side: str) -> tuple[dict[str, Any], dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side=padding_side)
    size = len(QUERY_LENGTHS)
    config = PPOConfig(**{"batch_size": size, "learning_rate": 1e-3, "seed": 0, **scenario.config})
    trainer = WatchedTrainer(config, load_policy(base, policy), ref_model=None, tokenizer=tokenizer)
    if scenario.clip_every_update:
        trainer.model_params = list(trainer.model_params)
    trainer.running = TensorMoments(trainer.running)
    trainer.watch_gradients()
    generator = random.Random(scenario.name)
    query_lengths = QUERY_LENGTHS if scenario.padded else [13 - length for length in RESPONSE_LENGTHS]
    steps = [_step(trainer, generator, query_lengths) for _ in range(scenario.steps)]
    weights = get_peft_model_state_dict(trainer.model.pretrained_model) | trainer.model.state_dict()
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    return {"policy": policy, "config": {name: getattr(config, name) for name in SETTINGS}, "steps": steps}, weights


def _step(trainer: WatchedTrainer, generator: random.Random, query_lengths: Sequence[int]) -> dict[str, Any]:
    queries = [random_ids(generator, length) for length in query_lengths]
    responses = [random_ids(generator, length) for length in RESPONSE_LENGTHS]
    responses[1][-1] = EOS
    scores = [round(generator.gauss(0.5, 1.5), 3) for _ in queries]
    orders = [generator.sample(range(len(queries)), len(queries)) for _ in range(trainer.config.ppo_epochs)]
    trainer.watch()
    with mock.patch("numpy.random.permutation", side_effect=_in_turn(orders)):
        stats = trainer.step(
            [torch.tensor(query) for query in queries],
            [torch.tensor(response) for response in responses],
            [torch.tensor(score) for score in scores],
        )
    scalars = {key: value for key, value in stats.items() if isinstance(value, float) and not key.startswith("time/")}
    scalars["objective/kl_dist"] = numbers(torch.as_tensor(stats["objective/kl_dist"]))
    return {
        "queries": queries,
        "responses": responses,
        "scores": scores,
        "permutations": orders[: -(-len(trainer.minibatches) * trainer.config.mini_batch_size // len(queries))],
        "batch": trainer.batch,
        "minibatches": trainer.minibatches,
        "stats": scalars,
        "kl_coef_after": float(trainer.kl_ctl.value),
    }


def _in_turn(orders: list[list[int]]) -> Iterator[np.ndarray]:
    return itertools.chain(map(np.array, orders))
