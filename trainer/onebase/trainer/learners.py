"""Where a step's data come from: completions that the policy draws and a judge scores, or rows that bring their own.

A learner is what the loop knows of an algorithm: rows of prompts in, what came of learning from them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from onebase.client import types as t
from onebase.trainer.algorithms import DpoStepper, GrpoStepper, PpoStepper, ReinforcePpStepper, RlooStepper, SftStepper
from onebase.trainer.algorithms.experience import numbers_of, read_experience
from onebase.trainer.algorithms.stepper import PolicyStepper
from onebase.trainer.config import TrainConfig
from onebase.trainer.hyperparameters import Given
from onebase.trainer.parsing import ConfigError
from onebase.trainer.prompts import PromptRow
from onebase.trainer.rewards import Judge, Judged
from onebase.trainer.rollout import Rollout, roll_out
from onebase.trainer.stats import Stats, reward_stats
from onebase.trainer.timing import Stopwatch

if TYPE_CHECKING:
    from onebase.client import Session

BROUGHT_BY_COMPLETIONS: tuple[t.ScoreOutput, ...] = ("logprobs", "values")
"""What an exact server gives with the completions, to the bit as Score would."""


@dataclass(frozen=True)
class Learned:
    """What came of a step."""

    stats: Stats
    samples: Sequence[Mapping[str, Any]]
    """Each completion with its prompt, and its reward and scores if it was judged."""
    tokens: int
    """Tokens of all completions."""


class Learner(Protocol):
    """An algorithm with its source of data."""

    rows_per_step: int
    """Rows of prompts that a step takes."""

    @property
    def version(self) -> int | None:
        """The policy's version after the last step; None before the first."""
        ...

    def learn(self, rows: Sequence[PromptRow], seed: int, /) -> Learned:
        """Makes one step; the same seed draws the same completions."""
        ...

    def state(self) -> dict[str, Any]:
        """What lies between two steps besides the weights: plain values for JSON."""
        ...

    def restore(self, state: Mapping[str, Any], version: int) -> None:
        """Takes up what `state` gave, with the policy at this version."""
        ...


def make_learner(
    config: TrainConfig, session: Session, base: t.BaseModel, judge: Judge, rng: np.random.Generator
) -> Learner:
    """The learner that a configuration asks for.

    Args:
        config: the run.
        session: holds the lease of the policy.
        base: the server's base model.
        judge: scores completions.
        rng: draws minibatches.
    """
    if config.algorithm == "sft":
        return Imitation(SftStepper(session, config.sft, eos=_end(config.sft, base, "sft")))
    if config.algorithm == "dpo":
        end = _end(config.dpo, base, "dpo")
        return Imitation(DpoStepper(session, config.dpo, eos=end, reference=config.reference))
    stepper: PolicyStepper[Any]
    match config.algorithm:
        case "ppo":
            stepper = PpoStepper(
                session,
                config.ppo,
                reference=config.reference,
                critic=config.critic.name if config.critic else "",
                critic_learning_rate=config.critic.learning_rate if config.critic else None,
                rng=rng,
            )
        case "grpo":
            longest = config.generation.max_new_tokens
            stepper = GrpoStepper(session, config.grpo, max_new_tokens=longest, reference=config.reference, rng=rng)
        case "rloo":
            stepper = RlooStepper(session, config.rloo, reference=config.reference, rng=rng)
        case "reinforce_pp":
            stepper = ReinforcePpStepper(session, config.reinforce_pp, reference=config.reference, rng=rng)
    return Reinforcement(config, session, judge, stepper, exact=base.exact)


class Reinforcement:
    """Learns from completions that the policy draws and the judge scores."""

    def __init__(
        self, config: TrainConfig, session: Session, judge: Judge, stepper: PolicyStepper[Any], *, exact: bool
    ) -> None:
        """`exact`: the completions bring the policy's logprobs and values, and Score is not asked for them again."""
        self._config = config
        self._session = session
        self._judge = judge
        self._stepper = stepper
        self._critic = config.critic.name if config.critic else ""
        brought = BROUGHT_BY_COMPLETIONS if exact else ()
        if self._critic:
            brought = tuple(output for output in brought if output != "values")  # the policy's head has no part
        self._brought = tuple(output for output in stepper.outputs if output in brought)
        self._asked = tuple(output for output in stepper.outputs if output not in brought)
        self.rows_per_step = stepper.config.batch_size // stepper.config.completions_per_prompt

    @property
    def version(self) -> int | None:
        """The policy's version after the last step; None before the first."""
        return self._stepper.version

    def learn(self, rows: Sequence[PromptRow], seed: int, /) -> Learned:
        """Draws completions, has them judged, and trains on them."""
        stepper, watch = self._stepper, Stopwatch()
        rollout = roll_out(
            self._session,
            rows,
            self._config.generation,
            seed,
            per_prompt=stepper.config.completions_per_prompt,
            outputs=self._brought,
        )
        generated = watch.lap()
        judged = self._judge(self._session, rollout, self._asked, critic=self._critic)
        forward = watch.lap()
        experience = read_experience(
            rollout.prompts,
            rollout.responses,
            judged.rewards,
            numbers_of(judged.scored, self._asked) | numbers_of(rollout.completions, self._brought),
            query_lengths=[completion.prompt_tokens for completion in rollout.completions],
            version=rollout.completions[0].adapter.version,
        )
        stats = stepper.update(experience)
        stats |= reward_stats(judged.rewards)
        stats |= {f"reward/{name}": float(scores.mean()) for name, scores in judged.raw.items()}
        stats |= {
            "time/generate": generated,
            f"time/{stepper.name}/forward_pass": forward,
            f"time/{stepper.name}/total": forward + watch.lap(),
        }
        return Learned(stats, _judged_samples(rollout, judged), rollout.tokens)

    def state(self) -> dict[str, Any]:
        """The stepper's."""
        return self._stepper.state()

    def restore(self, state: Mapping[str, Any], version: int) -> None:
        """Takes up what `state` gave, with the policy at this version."""
        self._stepper.restore(state)
        self._stepper.version = version


class Imitation:
    """Learns from completions that the rows of prompts bring."""

    def __init__(self, stepper: SftStepper | DpoStepper) -> None:
        self._stepper = stepper
        self.rows_per_step = stepper.config.batch_size

    @property
    def version(self) -> int | None:
        """The policy's version after the last step; None before the first."""
        return self._stepper.version

    def learn(self, rows: Sequence[PromptRow], _seed: int, /) -> Learned:
        """Trains on the rows; nothing is drawn, so the seed has no part in it."""
        columns = [[self._completion(row, key) for row in rows] for key in self._stepper.config.columns]
        stats = self._stepper.step([row.prompt for row in rows], *columns)
        samples = [
            {"prompt": row.prompt, "completion": completion} for row, completion in zip(rows, columns[0], strict=True)
        ]
        tokens = round(cast("float", stats["tokens/responses_len_mean"]) * len(rows) * len(columns))
        return Learned(stats, samples, tokens)

    def state(self) -> dict[str, Any]:
        """The stepper's."""
        return self._stepper.state()

    def restore(self, state: Mapping[str, Any], version: int) -> None:
        """Takes up what `state` gave, with the policy at this version."""
        self._stepper.restore(state)
        self._stepper.version = version

    def _completion(self, row: PromptRow, key: str) -> str | list[int]:
        return completion_of(row, getattr(self._stepper.config, key), f"{self._stepper.name}.{key}")


def completion_of(row: PromptRow, column: str, key: str) -> str | list[int]:
    """The completion that a row brings in a column, which the setting `key` names.

    Raises:
        ConfigError: it brings none.
    """
    if column not in row.columns:
        raise ConfigError(key, f"no column {column!r}; there are {', '.join(row.columns) or 'none'}")
    completion = row.columns[column]
    is_tokens = isinstance(completion, list) and all(type(token) is int for token in completion)
    if not completion or not (isinstance(completion, str) or is_tokens):
        raise ConfigError(
            key,
            f"the row of prompt {row.prompt!r} holds {completion!r}, which is neither a text nor a list of token ids",
        )
    return cast("str | list[int]", completion)


def _end(section: Given, base: t.BaseModel, where: str) -> int | None:
    """The token that ends completions, if one is wanted."""
    if not section.append_eos:
        return None
    if not base.eos_token_ids:
        raise ConfigError(f"{where}.append_eos", "is true, but the base has no end-of-sequence token; set it to false")
    return base.eos_token_ids[0]


def _judged_samples(rollout: Rollout, judged: Judged) -> list[Mapping[str, Any]]:
    return [
        {
            "prompt": row.prompt,
            "completion": completion.text,
            "reward": float(judged.rewards[index]),
            "scores": {name: float(scores[index]) for name, scores in judged.raw.items()},
        }
        for index, (row, completion) in enumerate(zip(rollout.rows, rollout.completions, strict=True))
    ]
