"""Stage 3 with real processes: one server, two trainings at once, and questions, on the smallest base there is."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import psutil
import pytest
from common import write_jsonl
from processes import ChildFailed, Children
from reviews import prompts
from rich.console import Console
from stage3 import Paths, Policy, read_latencies, train_policies
from verdict import read_result, summarize

FIXTURES = Path(__file__).parents[1] / "oracle" / "fixtures"
EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment"
SMALL = ["--ppo.batch_size", "4", "--ppo.mini_batch_size", "2", "--generation.max_new_tokens", "6"]
SMALL += ["--steps", "2", "--eval.samples", "3", "--policy.rank", "2", "--log.tensorboard", "false"]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    data = tmp_path / "data"
    for name, held_out in (("prompts", False), ("prompts_heldout", True)):
        write_jsonl(data / f"{name}.jsonl", [{"prompt": text} for text in prompts(0, 8, held_out=held_out)])
    return Paths(tmp_path, FIXTURES / "base", FIXTURES / "reward", data)


@pytest.fixture
def policies(paths: Paths) -> list[Policy]:
    return [paths.policy(EXAMPLE / f"policy_{number}.yaml") for number in (1, 2)]


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.mark.e2e
def test_two_policies_train_at_once_while_questions_are_answered(paths: Paths, policies: list[Policy]) -> None:
    before = descendants()
    screen = StringIO()
    with Children(paths.root / "logs") as children:
        status = train_policies(policies, paths, children, Console(file=screen, width=120), SMALL)
        assert descendants() == before  # the server and the questions were stopped in good order
    results = {policy.name: read_result(policy) for policy in policies}
    latencies = read_latencies(paths.questions)
    summary = summarize(results, 1.0, latencies, status, 1.0)

    assert latencies.count > 0
    assert latencies.p95_ms >= latencies.p50_ms > 0
    assert set(summary["server"]["adapter_bytes"]) == {"policy_1", "policy_2", "sentiment"}
    assert summary["server"]["peak_rss_bytes"] > summary["server"]["base_bytes"] > 0
    for name, result in results.items():
        assert (result.steps, len(result.samples)) == (2, 3)
        assert math.isfinite(result.kl)
        assert result.adapter_version == 2 * 2 * 2  # steps, epochs, minibatches
        assert name in screen.getvalue()
    assert results["policy_1"].reward_before == results["policy_2"].reward_before  # both begin as the base
    asked = [json.loads(line) for line in paths.questions.read_text(encoding="utf-8").splitlines()]
    assert all(len(question["scores"]) == 2 for question in asked)


@pytest.mark.e2e
def test_a_training_that_cannot_run_ends_everything_and_says_why(paths: Paths, policies: list[Policy]) -> None:
    before = descendants()

    def demo() -> None:
        with Children(paths.root / "logs") as children:
            train_policies(policies, paths, children, Console(file=StringIO()), ["--ppo.batch_size", "7"])

    with pytest.raises(ChildFailed, match=r"(?s)policy_\d ended with exit code 1.*batch_size"):
        demo()
    assert descendants() == before
