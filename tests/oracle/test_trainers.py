"""GRPO, RLOO, SFT and DPO are TRL's current trainers': advantages, losses, statistics, and the weights afterwards.

The fixtures were made so that TRL in float32 agrees with itself in float64 to 2e-6 of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracle.fixtures import (
    FIXTURES,
    RecordedOrders,
    assert_close,
    assert_same_weights,
    replay,
    saved_weights,
    weights_after,
)
from safetensors.numpy import load_file

from onebase.client import Client, Session
from onebase.trainer import (
    DpoConfig,
    DpoStepper,
    GrpoConfig,
    GrpoStepper,
    RlooConfig,
    RlooStepper,
    SftConfig,
    SftStepper,
)

GRPO, RLOO, SFT, DPO = (
    sorted(path.stem for path in FIXTURES.glob(f"{algorithm}_*.json")) for algorithm in ("grpo", "rloo", "sft", "dpo")
)
EOS = 2


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    """A session that holds the lease of a fresh copy of the policy that TRL began with."""
    client.load_adapter("fresh", "policy", kind="policy")
    with client.open_session("fresh") as session:
        yield session
    client.delete_adapter("fresh")


def test_clipping_and_the_reference_matter_in_what_was_recorded() -> None:
    """Guards the fixtures: a stepper without them would not pass."""
    for algorithm, scenarios in (("grpo", GRPO), ("rloo", RLOO)):
        steps = [step for name in scenarios for step in replay(name)["steps"]]
        assert any(step["clip_ratio"] > 0.1 for step in steps), algorithm
        assert any(replay(name)["config"]["beta"] for name in scenarios), algorithm
    assert {replay(name)["config"]["loss_type"] for name in GRPO} == {"grpo", "bnpo", "dr_grpo", "dapo"}
    assert {replay(name)["config"]["scale_rewards"] for name in GRPO} == {"group", "batch", "none"}


@pytest.mark.parametrize("scenario", GRPO)
def test_grpo_is_trls(session: Session, root: Path, scenario: str) -> None:
    record = replay(scenario)
    orders = RecordedOrders(record["steps"])
    config = GrpoConfig(**record["config"])
    stepper = GrpoStepper(session, config, max_new_tokens=record["max_new_tokens"], rng=orders)
    for step in record["steps"]:
        stats = stepper.step(step["queries"], step["responses"], step["scores"])
        assert_close(stats["grpo/advantages"], step["advantages"], "advantages")
        assert_close(stats["grpo/loss/total"], np.mean(step["losses"]), "loss", scale=1.0)
        assert_close(stats["grpo/policy/entropy"], step["entropy"], "entropy")
    assert orders.left == 0  # as many iterations as TRL made
    _assert_weights(session, root / f"saved-{scenario}", scenario)


@pytest.mark.parametrize("scenario", RLOO)
def test_rloo_is_trls(session: Session, root: Path, scenario: str) -> None:
    record = replay(scenario)
    orders = RecordedOrders(record["steps"])
    stepper = RlooStepper(session, RlooConfig(**record["config"]), rng=orders)
    for step in record["steps"]:
        stats = stepper.step(step["queries"], step["responses"], step["scores"])
        assert_close(stats["rloo/advantages"], step["advantages"], "advantages")
        assert_close(stats["rloo/loss/policy"], np.mean(step["losses"]), "loss", scale=1.0)
        assert_close(stats["rloo/policy/clipfrac"], step["clip_ratio"], "clip ratio", scale=1.0)
    assert orders.left == 0  # as many iterations as TRL made
    _assert_weights(session, root / f"saved-{scenario}", scenario)


@pytest.mark.parametrize("given", ["texts", "tokens"])
@pytest.mark.parametrize("scenario", SFT)
def test_sft_is_trls(session: Session, root: Path, scenario: str, given: str) -> None:
    record = replay(scenario)
    stepper = SftStepper(session, SftConfig(**record["config"]), eos=EOS)
    completions = record["completions"] if given == "texts" else record["tokens"]
    for loss, norm in zip(record["losses"], record["grad_norms"], strict=True):
        stats = stepper.step(record["prompts"], completions)
        assert_close(stats["sft/loss/total"], loss, "loss")
        assert_close(stats["sft/grad_norm"], norm, "grad_norm")
    _assert_weights(session, root / f"saved-{scenario}-{given}", scenario)


@pytest.mark.parametrize("scenario", DPO)
def test_dpo_is_trls(session: Session, root: Path, scenario: str) -> None:
    record = replay(scenario)
    stepper = DpoStepper(session, DpoConfig(**record["config"]), eos=EOS)
    for loss, norm in zip(record["losses"], record["grad_norms"], strict=True):
        stats = stepper.step(record["prompts"], record["chosen"], record["rejected"])
        assert_close(stats["dpo/loss/total"], loss, "loss")
        assert_close(stats["dpo/grad_norm"], norm, "grad_norm")
    _assert_weights(session, root / f"saved-{scenario}", scenario)


def _assert_weights(session: Session, path: Path, scenario: str) -> None:
    """The adapter's are TRL's, and its value head, of which none of these trainers knows, is untouched."""
    head = load_file(FIXTURES / "policy" / "value_head.safetensors")
    saved = session.save_adapter(str(path))
    assert_same_weights(saved_weights(saved.path), weights_after(scenario) | head)
