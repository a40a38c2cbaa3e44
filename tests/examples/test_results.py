"""What a training wrote becomes a result without its weight, summary.json has its shape, and the plot is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from common import write_jsonl
from stage3 import Latencies, Paths, Policy, read_latencies
from verdict import Result, plot, read_result, summarize

from onebase.client import Adapter, LoraSpec, ServerStatus

ROW = {"prompt": "A film.", "before": " Fine.", "after": " Awful.", "reward_before": -0.5, "reward_after": 6.0}
WRITTEN = {
    "reward_before": -1.0,
    "reward_after": 5.0,
    "reward_std_before": 3.0,
    "scores_before": {"sentiment": 0.5},
    "scores_after": {"sentiment": -2.5},
    "kl": 4.0,
    "steps": 2,
    "adapter_version": 16,
    "samples": [ROW],
}


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    """A run that was trained with weight -2, so that its rewards are -2 times the scores."""
    run = tmp_path / "runs" / "policy_2"
    metrics = [{"step": 0, "eval/reward_mean": -1.0}]
    metrics += [{"step": step, "reward/sentiment": -step, "objective/kl": step / 10} for step in (1, 2)]
    write_jsonl(run / "metrics.jsonl", metrics)
    (run / "summary.json").write_text(json.dumps(WRITTEN), encoding="utf-8")
    return Policy("policy_2", tmp_path / "policy_2.yaml", "sentiment", -2.0, run)


def adapter(name: str, size: int) -> Adapter:
    """An adapter that holds 4 * size bytes in all."""
    sizes = (size, size, size, size)
    return Adapter(name, "policy", 16, LoraSpec(), True, 0, 10, *sizes, False, 0, 0.0, "")


def test_a_result_has_the_reward_adapters_own_scores(policy: Policy) -> None:
    result = read_result(policy)
    assert (result.reward_before, result.reward_after, result.reward_std_before) == (0.5, -2.5, 1.5)
    assert result.change == pytest.approx(2.0)
    [sample] = result.samples
    assert (sample.reward_before, sample.reward_after) == (0.25, -3.0)


def test_the_curve_leaves_out_the_evaluation_and_a_line_half_written(policy: Policy) -> None:
    with (policy.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "reward/sent')
    assert policy.curve == [(1, -1, 0.1), (2, -2, 0.2)]


def test_summary_json_has_exactly_its_keys() -> None:
    result = Result(1.0, 0.0, 2.0, 1.0, 3.0, 40, 320, ())
    status = ServerStatus(
        1.0, (), (adapter("policy_1", 25), adapter("sentiment", 5)), (), 0.0, 0.0, 0.0, 0, 70, 90, 50, 0, 0, 0
    )
    assert summarize({"policy_1": result}, 0.97, Latencies(3, 20.0, 90.0), status, 280.0) == {
        "policies": {
            "policy_1": {
                "reward_before": 0.0,
                "reward_after": 2.0,
                "reward_std_before": 1.0,
                "kl": 3.0,
                "steps": 40,
                "adapter_version": 320,
            }
        },
        "reward_model": {"pair_accuracy": 0.97},
        "interactive_reward": {"count": 3, "p50_ms": 20.0, "p95_ms": 90.0},
        "server": {"peak_rss_bytes": 90, "base_bytes": 50, "adapter_bytes": {"policy_1": 100, "sentiment": 20}},
        "seconds": 280.0,
    }


def test_latencies_are_percentiles_of_what_was_asked(tmp_path: Path) -> None:
    assert read_latencies(tmp_path / "none.jsonl").count == 0
    write_jsonl(tmp_path / "asked.jsonl", [{"ms": float(ms)} for ms in range(101)])
    assert read_latencies(tmp_path / "asked.jsonl") == Latencies(101, 50.0, 95.0)


def test_the_plot_is_a_png(policy: Policy, tmp_path: Path) -> None:
    plot([policy], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("number", "weight"), [(1, 1.0), (2, -1.0)])
def test_the_demos_policies_are_read_from_their_configurations(number: int, weight: float, tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "examples" / "sentiment" / f"policy_{number}.yaml"
    policy = Paths(tmp_path, tmp_path, tmp_path, tmp_path).policy(config)
    assert (policy.name, policy.adapter, policy.weight) == (f"policy_{number}", "sentiment", weight)
