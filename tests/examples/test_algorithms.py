"""`make algorithms`: what it reads, promises and writes, and one small run of it."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path

import pytest
from algorithms import CONFIGS, NAMES, TABLE, Outcome, shortcomings, table, train_all, write
from common import write_jsonl
from processes import Children
from reviews import prompts
from rich.console import Console
from stage3 import Paths

from onebase.trainer import load_config

FIXTURES = Path(__file__).parents[1] / "oracle" / "fixtures"
EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment"
DOCS = Path(__file__).parents[2] / "docs"
ONE = Outcome(
    reward_before=0.5,
    reward_after=2.5,
    reward_std_before=1.0,
    gain=2.0,
    kl=6.25,
    steps=2,
    completions=128,
    tokens=2000,
    seconds=61.4,
    settings={"batch_size": 64},
    curve=[(1, 0.5, 0.0), (2, 2.5, 6.25)],
)
OUTCOMES = dict.fromkeys(CONFIGS, ONE)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "sft", "dpo", "policy_1", "policy_2"])
def test_every_configuration_can_be_used(name: str) -> None:
    config = load_config(EXAMPLE / f"{name}.yaml")
    assert config.algorithm == ("ppo" if name.startswith("policy") else name)


def test_what_is_compared_has_as_many_completions_of_the_same_prompts_by_the_same_steps() -> None:
    configs = [load_config(path) for path in CONFIGS.values()]
    assert [config.algorithm for config in configs] == list(CONFIGS)
    sections = [config.optimization for config in configs]
    alike = {(s.batch_size, s.mini_batch_size, s.learning_rate) for s in sections}
    assert len(alike) == 1
    assert len({(c.seed, c.steps, c.generation, c.eval, c.rewards, c.prompts, c.policy.rank) for c in configs}) == 1
    passes = [getattr(s, "num_iterations", None) or s.ppo_epochs for s in sections]  # type: ignore[attr-defined]
    assert passes == [2, 2, 2, 2]


def test_less_than_ppo_is_said() -> None:
    assert shortcomings(OUTCOMES) == []
    less = OUTCOMES | {"rloo": dataclasses.replace(ONE, gain=1.9), "reinforce_pp": dataclasses.replace(ONE, gain=0.1)}
    assert shortcomings(less) == ["RLOO gained 1.90 standard deviations, PPO 2.00."]
    assert len(shortcomings(OUTCOMES | {"grpo": dataclasses.replace(ONE, gain=float("nan"))})) == 1


def test_the_table_goes_into_the_page_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "algorithms.md"
    page.write_text(f"before\n{TABLE[0]}\nold\n{TABLE[1]}\nafter\n", encoding="utf-8")
    write(tmp_path, OUTCOMES, 300.0)
    assert page.read_text(encoding="utf-8") == f"before\n{TABLE[0]}\n{table(OUTCOMES)}\n{TABLE[1]}\nafter\n"
    assert "| GRPO | +0.50 | +2.50 | 2.00 | 6.2 | 128 | 2000 | 61 |" in table(OUTCOMES)
    first = (tmp_path / "algorithms.svg").read_bytes()
    write(tmp_path, OUTCOMES, 300.0)
    assert (tmp_path / "algorithms.svg").read_bytes() == first
    written = json.loads((tmp_path / "algorithms.json").read_text(encoding="utf-8"))
    assert written["algorithms"]["rloo"]["gain"] == 2.0
    assert set(written["versions"]) > {"python", "onebase", "torch"}


def test_the_page_shows_the_numbers_that_lie_beside_it() -> None:
    written = json.loads((DOCS / "algorithms.json").read_text(encoding="utf-8"))
    outcomes = {name: Outcome(**outcome) for name, outcome in written["algorithms"].items()}
    assert list(outcomes) == list(NAMES)
    assert table(outcomes) in (DOCS / "algorithms.md").read_text(encoding="utf-8")
    assert shortcomings(outcomes) == []


@pytest.mark.e2e
def test_all_algorithms_train_in_turn_on_one_server(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, held_out in (("prompts", False), ("prompts_heldout", True)):
        write_jsonl(data / f"{name}.jsonl", [{"prompt": text} for text in prompts(0, 8, held_out=held_out)])
    paths = Paths(tmp_path, FIXTURES / "base", FIXTURES / "reward", data)
    flags = ["--steps", "2", "--eval.samples", "3", "--policy.rank", "2", "--generation.max_new_tokens", "6"]
    with Children(tmp_path / "logs") as children:
        outcomes = train_all(paths, children, Console(file=StringIO()), flags)
    assert list(outcomes) == list(CONFIGS)
    for outcome in outcomes.values():
        assert (outcome.steps, outcome.completions, len(outcome.curve)) == (2, 128, 2)
        assert 128 <= outcome.tokens <= 128 * 6
        assert outcome.kl > 0
    assert len({outcome.reward_before for outcome in outcomes.values()}) == 1  # all begin as the base
    assert len({outcome.reward_after for outcome in outcomes.values()}) == len(outcomes)
