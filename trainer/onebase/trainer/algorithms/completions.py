"""What the algorithms that learn from given completions share: their token ids, and one optimizer step a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.trainer.algorithms.gradients import Gradients
from onebase.trainer.hyperparameters import DpoConfig, SftConfig
from onebase.trainer.stats import Stats, length_stats, pass_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

Config = TypeVar("Config", SftConfig, DpoConfig)


class CompletionStepper(Generic[Config]):
    """Makes steps with a session's policy on completions that are given.

    Attributes:
        config: the algorithm's settings.
        version: the policy's version after the last step; None before the first.
    """

    name: ClassVar[str]
    """The algorithm's name, which its statistics begin with."""

    def __init__(self, session: Session, config: Config, *, eos: int | None, adapter: str) -> None:
        """Stands before the first step.

        Args:
            session: holds the lease of the policy.
            config: the algorithm's settings.
            eos: id of the end-of-sequence token; None where there is none to append.
            adapter: the policy; "" is the session's active adapter.
        """
        self.config: Config = config
        self.version: int | None = None
        self._session = session
        self._eos = eos if config.append_eos else None
        self._adapter = adapter
        self._gradients = Gradients(session, adapter)

    def state(self) -> dict[str, Any]:
        """What lies between two steps besides the weights: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""

    def _train(self, rows: Sequence[t.TrainingSequence], size: int, loss: t.Loss, denominator: float) -> Stats:
        """Passes of `size` rows each and an optimizer step.

        Each pass's loss is divided by what the whole batch's is, so that their sum is the batch's.
        """
        times, passes = Stopwatch(), []
        for start in range(0, len(rows), size):
            result = self._gradients.add(
                rows[start : start + size], loss, denominator=denominator, expected_version=self.version
            )
            passes.append(result.metrics)
        config = self.config
        stepped = self._gradients.step(
            config.learning_rate, config.max_grad_norm, expected_version=result.adapter.version
        )
        self.version = stepped.adapter.version
        return (
            pass_stats(self.name, passes)
            | {
                f"{self.name}/loss/total": float(sum(metrics["loss/total"] for metrics in passes)),
                f"{self.name}/grad_norm": stepped.grad_norm,
                f"{self.name}/learning_rate": config.learning_rate,
                f"time/{self.name}/optimize_step": times.lap(),
            }
            | length_stats([], [len(row.completion) for row in rows])
        )


def token_ids(
    session: Session, prompts: Sequence[t.Content], completions: Sequence[t.Content], *, adapter: str, eos: int | None
) -> list[NDArray[np.integer[Any]]]:
    """Token ids of each completion.

    Args:
        session: of a policy.
        prompts: what each completion follows, as texts or token ids.
        completions: texts, or token ids.
        adapter: the policy; "" is the session's active adapter.
        eos: the token that is put behind completions which do not end with it; None leaves them as they are.

    Raises:
        ValueError: an empty completion.
    """
    for index, completion in enumerate(completions):
        if len(completion) == 0:
            raise ValueError(f"completions[{index}] is empty; there is nothing to learn from it")
    texts = [index for index, completion in enumerate(completions) if isinstance(completion, str)]
    tokens = [np.array([] if isinstance(completion, str) else completion, int) for completion in completions]
    if texts:
        asked = [t.Sequence(prompts[index], completions[index]) for index in texts]
        for index, answer in zip(texts, session.logprob(asked, adapter=adapter), strict=True):
            tokens[index] = np.asarray(answer.completion_tokens, int)
    if eos is None:
        return tokens
    return [row if row[-1] == eos else np.append(row, eos) for row in tokens]


def check_count(name: str, given: Sequence[object], batch_size: int) -> None:
    """Raises ValueError unless there are batch_size of them."""
    if len(given) != batch_size:
        raise ValueError(f"{name} holds {len(given)}, but batch_size is {batch_size}")
