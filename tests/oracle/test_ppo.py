"""Training is TRL's: losses, gradients' norms, statistics and the weights afterwards.

Adam's first update is lr·g/(|g| + eps), so where a gradient is near eps its last digits decide the update and no two
programs agree. The fixtures were made so that TRL, run once with right and once with left padding, agrees with itself
to 1e-6 of every tensor (to 4e-7, as it is): with gradients of norm 1 and more, lr 1e-3 and eps 1e-8 no element comes
near. Weights are compared relative to their tensor's largest magnitude, at which one update is some 3e-3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle.fixtures import (
    FIXTURES,
    RecordedOrders,
    assert_close,
    assert_rows_close,
    assert_same_weights,
    replay,
    saved_weights,
    weights_after,
)

from onebase.client import Client, Session
from onebase.client.types import AdamW, PpoLoss, TrainingSequence
from onebase.trainer.advantages import advantages_and_returns, pad, token_rewards
from onebase.trainer.algorithms import PpoStepper
from onebase.trainer.hyperparameters import PpoConfig

SCENARIOS = sorted(path.stem for path in FIXTURES.glob("ppo_*.json"))

SCALES = {
    **dict.fromkeys(("loss/policy", "loss/total", "policy/advantages_mean", "policy/policykl"), 1.0),
    **dict.fromkeys(("objective/kl", "objective/kl_dist", "mean_non_score_reward", "mean_scores"), 1.0),
    "policy/approxkl": 1e-2,
    "returns/mean": 1.0,
    "val/var_explained": 1.0,
}
"""Least magnitudes to be relative to, for numbers that are small because large ones cancel in them.

Whitened advantages are of size 1 and sum to nearly 0; logprobs are of size 4, and their differences after one small
update are some 1e-2, half of whose square is approxkl. Before the first update TRL has 0 there and we have rounding.
"""


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    """A session that holds the lease of a fresh copy of the policy that TRL began with."""
    client.load_adapter("fresh", "policy", kind="policy")
    with client.open_session("fresh") as session:
        yield session
    client.delete_adapter("fresh")


def test_the_policy_that_training_starts_from_is_not_the_reference() -> None:
    assert all(abs(step["stats"]["objective/kl"]) > 1e-2 for name in SCENARIOS for step in replay(name)["steps"])


def test_one_pass_and_one_step_on_trls_own_batch(session: Session, root: Path) -> None:
    record = replay("ppo_step")
    (step,), config = record["steps"], record["config"]
    (order,), (minibatch,) = step["permutations"], step["minibatches"]
    loss = PpoLoss(config["cliprange"], config["cliprange_value"], config["vf_coef"], config["ratio_threshold"])
    passed = session.forward_backward([_training_sequence(step, index) for index in order], loss)
    _assert_metrics(passed.metrics, minibatch["metrics"])
    assert_rows_close(passed.logprobs, minibatch["logprobs"], "logprobs")
    assert_rows_close(passed.values, minibatch["values"], "values")
    stepped = session.optim_step(AdamW(learning_rate=config["learning_rate"]))
    assert_close(stepped.grad_norm, minibatch["grad_norm"], "grad_norm")
    saved = session.save_adapter(str(root / "saved-ppo-step"))
    assert_same_weights(saved_weights(saved.path), weights_after("ppo_step"))


def test_rows_of_a_pass_may_come_in_several_calls(session: Session, root: Path) -> None:
    record = replay("ppo_step")
    (step,), config = record["steps"], record["config"]
    loss = PpoLoss(config["cliprange"], config["cliprange_value"], config["vf_coef"], config["ratio_threshold"])
    tokens = float(sum(map(len, step["responses"])))
    for start, stop in ((0, 1), (1, 5), (5, 8)):
        rows = [_training_sequence(step, index) for index in range(start, stop)]
        session.forward_backward(rows, loss, denominator=tokens)
    stepped = session.optim_step(AdamW(learning_rate=config["learning_rate"]))
    assert stepped.gradients_applied == 3
    assert_close(stepped.grad_norm, step["minibatches"][0]["grad_norm"], "grad_norm")
    saved = session.save_adapter(str(root / "saved-ppo-step-in-parts"))
    assert_same_weights(saved_weights(saved.path), weights_after("ppo_step"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_trainers_stepper_replays_trls_training(session: Session, root: Path, scenario: str) -> None:
    record = replay(scenario)
    orders = RecordedOrders(record["steps"])
    stepper = PpoStepper(session, PpoConfig(**record["config"]), rng=orders)
    for step in record["steps"]:
        assert_close(stepper.kl_coef, step["batch"]["kl_coef"], "kl_coef")
        stats = stepper.step(step["queries"], step["responses"], step["scores"])
        missing = sorted(set(step["stats"]) - set(stats))
        assert not missing, f"stats of TRL that are not there: {missing}"
        _assert_metrics(stats, step["stats"])
        ratios = [minibatch["metrics"]["policy/ratio"] for minibatch in step["minibatches"]]
        assert_close(stats["ppo/policy/ratio"], np.mean(ratios), "mean ratio")
    assert_close(stepper.kl_coef, record["steps"][-1]["kl_coef_after"], "kl_coef afterwards")
    assert orders.left == 0  # as many epochs as TRL made, early stopping included
    saved = session.save_adapter(str(root / f"saved-{scenario}"))
    assert_same_weights(saved_weights(saved.path), weights_after(scenario))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_token_rewards_advantages_and_returns_are_trls(scenario: str) -> None:
    config = replay(scenario)["config"]
    for step in replay(scenario)["steps"]:
        batch = step["batch"]
        lengths = [len(response) for response in step["responses"]]
        width = max(lengths)
        mask = np.arange(width) < np.array(lengths)[:, None]
        logprobs, reference, values = (
            pad(batch[name], width) for name in ("old_logprobs", "reference_logprobs", "old_values")
        )
        if not config["use_score_scaling"]:  # scaled scores are the stepper's work
            scores = np.array(step["scores"])
            rewards = token_rewards(scores, logprobs, reference, mask, batch["kl_coef"], config["kl_penalty"])
            _assert_padded(rewards.rewards, batch["rewards"], "rewards")
        estimate = advantages_and_returns(
            values,
            pad(batch["rewards"], width),
            mask,
            gamma=config["gamma"],
            lam=config["lam"],
            whiten_rewards=config["whiten_rewards"],
        )
        _assert_padded(estimate.advantages, batch["advantages"], "advantages")
        _assert_padded(estimate.returns, batch["returns"], "returns")


def _training_sequence(step: dict[str, Any], index: int) -> TrainingSequence:
    def of(name: str) -> NDArray[np.float32]:
        return np.array(step["batch"][name][index], dtype=np.float32)

    return TrainingSequence(
        prompt=step["queries"][index],
        completion=step["responses"][index],
        old_logprobs=of("old_logprobs"),
        old_values=of("old_values"),
        advantages=of("advantages"),
        returns=of("returns"),
    )


def _assert_metrics(found: Any, expected: dict[str, Any]) -> None:
    for name, wanted in expected.items():
        assert_close(found[name], wanted, name, SCALES.get(name.removeprefix("ppo/"), 0.0))


def _assert_padded(found: NDArray[np.float64], expected: list[list[float]], what: str) -> None:
    assert_rows_close([row[: len(wanted)] for row, wanted in zip(found, expected, strict=True)], expected, what)
