"""What a completion is worth: the weighted sum of reward adapters and of a Python function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.trainer.config import TrainConfig
from onebase.trainer.parsing import ConfigError
from onebase.trainer.rollout import Rollout

if TYPE_CHECKING:
    from onebase.client import Session

RewardFunction: TypeAlias = Callable[..., Sequence[float]]
"""f(prompts, completions, **columns) -> one number per completion.

`prompts` are texts, lists of token ids or of messages, `completions` texts, `columns` lists of the prompts' other
columns; a function without **kwargs gets only the columns that it names.
"""

FUNCTION = "reward_function"
"""The name of the Python function among the raw scores."""


@dataclass(frozen=True)
class Judged:
    """A rollout's rewards."""

    rewards: NDArray[np.float64]  # [B]
    """What is maximized: the weighted sum."""
    raw: Mapping[str, NDArray[np.float64]]
    """The unweighted scores [B], by reward term ("adapter" or "adapter[label]"), and by "reward_function"."""
    scored: tuple[t.Score, ...]
    """What Score answered; empty if there was nothing to ask it."""


class Judge:
    """Judges rollouts as a configuration says."""

    def __init__(self, config: TrainConfig) -> None:
        """Imports the reward function, if there is one.

        Raises:
            ConfigError: reward_function names none.
        """
        self._terms = [t.RewardTerm(term.adapter, term.weight, term.label) for term in config.rewards]
        self._eos, self._eos_known = config.append_eos, config.append_eos is not None
        self._pooling = config.pooling
        self._reference = config.reference
        self._function = load_function(config.reward_function) if config.reward_function is not None else None
        self._function_weight = config.reward_function_weight

    def __call__(
        self, session: Session, rollout: Rollout, outputs: tuple[t.ScoreOutput, ...] = (), *, critic: str = ""
    ) -> Judged:
        """Judges a rollout; `outputs` come with the rewards, from the same call.

        Values are the critic's, if one is named.
        """
        asked: tuple[t.ScoreOutput, ...] = (*outputs, "rewards") if self._terms else outputs
        scored: tuple[t.Score, ...] = ()
        if asked:
            scored = tuple(
                session.score(
                    rollout.sequences,
                    rewards=self._terms or None,
                    reference=self._reference,
                    outputs=asked,
                    append_eos=self._append_eos(session),
                    pooling=self._pooling if self._terms else None,
                    critic=critic,
                )
            )
        rewards = np.zeros(len(rollout.rows))
        raw: dict[str, NDArray[np.float64]] = {}
        if self._terms:
            rewards += np.array([score.reward for score in scored])
            raw |= {term.key: np.array([score.scores[term.key] for score in scored]) for term in self._terms}
        if self._function is not None:
            raw[FUNCTION] = call_function(self._function, rollout)
            rewards += self._function_weight * raw[FUNCTION]
        return Judged(rewards, raw, scored)

    def _append_eos(self, session: Session) -> bool | None:
        """Whether to append an end of sequence; None leaves it to the adapters. The server is asked for them once."""
        if not self._terms:
            return None
        if not self._eos_known:
            self._eos = append_eos_of({term.adapter: session.adapter(term.adapter).append_eos for term in self._terms})
            self._eos_known = True
        return self._eos


def append_eos_of(declared: Mapping[str, bool | None]) -> bool | None:
    """What to ask for adapters that declare this; None where each declares it for itself.

    Completions are token ids, and the server appends nothing to those for an adapter that declares nothing. But what
    RewardTrainer trained such a one on is texts with their end of sequence.

    Raises:
        ConfigError: one adapter declares that it wants none, and another declares nothing.
    """
    silent = [name for name, append in declared.items() if append is None]
    refusing = [name for name, append in declared.items() if append is False]
    if not silent:
        return None
    if refusing:
        raise ConfigError(
            "append_eos",
            f"is not set, {refusing[0]!r} wants no end-of-sequence token, and {silent[0]!r} does not say; set it, or "
            f"start the server with --reward-append-eos {silent[0]}=yes",
        )
    return True


def call_function(function: RewardFunction, rollout: Rollout) -> NDArray[np.float64]:
    """The function's rewards [B].

    Raises:
        ConfigError: it did not give one finite number per completion.
    """
    names = _columns_wanted(function, list(rollout.rows[0].columns))
    columns = {name: [row.columns[name] for row in rollout.rows] for name in names}
    given = function(rollout.prompts, rollout.texts, **columns)
    try:
        rewards = np.array([float(reward) for reward in given])
    except (TypeError, ValueError) as error:
        raise ConfigError(FUNCTION, f"must return a list of numbers, but: {error}") from error
    if rewards.shape != (len(rollout.rows),):
        raise ConfigError(FUNCTION, f"gave {len(rewards)} rewards for {len(rollout.rows)} completions")
    if not np.isfinite(rewards).all():
        index = int(np.argmin(np.isfinite(rewards)))
        raise ConfigError(FUNCTION, f"gave {rewards[index]} for the completion {rollout.texts[index]!r}")
    return rewards


def load_function(spec: str) -> RewardFunction:
    """Imports "module:function" or "path/to/file.py:function".

    Raises:
        ConfigError: no such module, file or function.
    """
    source, colon, name = spec.rpartition(":")
    if not (source and colon and name):
        raise ConfigError(FUNCTION, f"{spec!r} is neither module:function nor path/to/file.py:function")
    module = _load_file(Path(source)) if source.endswith(".py") else _import(source)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(FUNCTION, f"{source} has no function {name!r}")
    found: RewardFunction = function
    return found


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            FUNCTION, f"no module {error.name!r}; install it, or name a file: path/to/file.py:function"
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(FUNCTION, f"{path} is not there")
    name = f"onebase_reward_function_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(FUNCTION, f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does: dataclasses in the file look themselves up there
    spec.loader.exec_module(module)
    return module


def _columns_wanted(function: RewardFunction, columns: list[str]) -> list[str]:
    parameters: Mapping[str, Any] = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return columns
    positional = list(parameters)[:2]  # prompts and completions, whatever they are called
    return [name for name in columns if name in parameters and name not in positional]
