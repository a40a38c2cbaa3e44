"""Turns what a run did into numbers, lines and a summary, and sends them to the logs and the display."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onebase.trainer.display import Display, StepReport
from onebase.trainer.evaluation import Evaluation
from onebase.trainer.learners import Learned
from onebase.trainer.logs import RunLog
from onebase.trainer.stats import scalars


@dataclass(frozen=True)
class StepResult:
    """Everything that one step made."""

    learned: Learned
    evaluation: Evaluation | None
    """The evaluation after the step, if there was one."""
    seconds: float
    adapter_version: int


class Reporter:
    """Reports to a run's log and display."""

    def __init__(self, log: RunLog, display: Display, algorithm: str, steps: int, samples: int) -> None:
        """Reports a run of `steps` steps of an algorithm, `samples` completions of each."""
        self._log = log
        self._display = display
        self._algorithm = algorithm
        self._steps = steps
        self._samples = samples

    def note(self, text: str) -> None:
        """Says something to whoever watches."""
        self._display.note(text)

    def before(self, evaluation: Evaluation) -> None:
        """Reports the evaluation before the first step, as step 0."""
        self._log.metrics(0, evaluation_stats(evaluation))
        self.note(f"reward before: {evaluation.mean:+.4f} (standard deviation {evaluation.std:.4f})")

    def step(self, step: int, result: StepResult) -> None:
        """Reports a finished step."""
        numbers = scalars(result.learned.stats)
        if result.evaluation is not None:
            numbers |= evaluation_stats(result.evaluation)
        numbers["seconds"] = result.seconds
        self._log.metrics(step, numbers | {"adapter_version": result.adapter_version})
        for sample in result.learned.samples[: self._samples]:
            self._log.sample(step, sample)
        self._display.step(self._view(step, result, numbers))
        if numbers.get("objective/kl", 0.0) < -1:
            self.note(
                f"KL is {numbers['objective/kl']:.2f}, below zero: are completions drawn from the policy itself "
                "(temperature 1, top_k 0, top_p 1, min_p 0)?"
            )

    def _view(self, step: int, result: StepResult, numbers: Mapping[str, float]) -> StepReport:
        first = result.learned.samples[0]
        return StepReport(
            step=step,
            steps=self._steps,
            reward=numbers.get("env/reward_mean"),
            loss=None if "env/reward_mean" in numbers else numbers[f"{self._algorithm}/loss/total"],
            kl=numbers.get("objective/kl"),
            kl_coef=numbers.get("objective/kl_coef"),
            entropy=numbers.get(f"{self._algorithm}/policy/entropy"),
            length=numbers["tokens/responses_len_mean"],
            tokens_per_second=result.learned.tokens / result.seconds,
            seconds=result.seconds,
            evaluation=None if result.evaluation is None else result.evaluation.mean,
            prompt=str(first["prompt"]),
            completion=str(first["completion"]),
            completion_reward=first.get("reward"),
        )


def evaluation_stats(evaluation: Evaluation) -> dict[str, float]:
    """eval/*: the rewards of an evaluation."""
    stats = {"eval/reward_mean": evaluation.mean, "eval/reward_std": evaluation.std}
    return stats | {f"eval/{name}": mean for name, mean in evaluation.raw_means.items()}


def summarize(
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    kl: float | None,
    steps: int,
    adapter_version: int,
    path: str,
) -> dict[str, Any]:
    """What summary.json holds.

    `reward_*` is what is maximized, the weighted sum; `scores_*` are the unweighted means by reward adapter. Both
    are None without an evaluation.
    """
    return {
        "reward_before": None if before is None else before.mean,
        "reward_after": None if after is None else after.mean,
        "reward_std_before": None if before is None or not math.isfinite(before.std) else before.std,
        "scores_before": None if before is None else before.raw_means,
        "scores_after": None if after is None else after.raw_means,
        "kl": kl,
        "steps": steps,
        "adapter_version": adapter_version,
        "adapter_path": path,
        "samples": _compare(before, after) if before is not None and after is not None else [],
    }


def _compare(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    columns = zip(before.prompts, before.completions, after.completions, before.rewards, after.rewards, strict=True)
    names = ("prompt", "before", "after", "reward_before", "reward_after")
    return [dict(zip(names, row, strict=True)) for row in columns]
