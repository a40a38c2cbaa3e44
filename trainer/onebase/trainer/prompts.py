"""Prompts to train on: read from a .jsonl file, or through `datasets`, and handed out in a seeded order."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onebase.trainer.config import PromptsConfig
from onebase.trainer.parsing import ConfigError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


Prompt: TypeAlias = str | list[int] | list[dict[str, str]]
"""A text, token ids, or a conversation: a list of messages with "role" and "content", as TRL has them."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and its row's other columns, which a reward function may want."""

    prompt: Prompt
    columns: Mapping[str, Any]


def load_prompts(config: PromptsConfig, key: str = "prompts") -> tuple[PromptRow, ...]:
    """Reads all prompts of a file, a directory or a data set on the hub.

    Args:
        config: where they are.
        key: the setting's name, for errors.

    Raises:
        ConfigError: nothing there, no such column, no rows, or a row that is no prompt.
    """
    rows = _read(config, key)
    if not rows:
        raise ConfigError(f"{key}.path", f"{config.path} holds no rows")
    if config.column not in rows[0]:
        raise ConfigError(f"{key}.column", f"no column {config.column!r}; there are {', '.join(map(str, rows[0]))}")
    return tuple(_prompt_row(row, index, config, key) for index, row in enumerate(rows))


def _prompt_row(row: Mapping[str, Any], index: int, config: PromptsConfig, key: str) -> PromptRow:
    prompt = row[config.column]
    if isinstance(prompt, str) and prompt:
        if config.max_tokens:
            raise ConfigError(
                f"{key}.max_tokens", "cuts prompts given as token ids only; these are texts, so leave it 0"
            )
    elif isinstance(prompt, list) and prompt and all(isinstance(message, Mapping) for message in prompt):
        if config.max_tokens:
            raise ConfigError(
                f"{key}.max_tokens", "cuts prompts given as token ids only; these are conversations, so leave it 0"
            )
        prompt = [_message(message, f"message {at} of row {index}", key) for at, message in enumerate(prompt)]
    elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        prompt = prompt[: config.max_tokens or None]
    else:
        raise ConfigError(
            f"{key}.path",
            f"row {index} holds {prompt!r}, which is neither a text nor a list of token ids or of messages",
        )
    return PromptRow(prompt, {name: value for name, value in row.items() if name != config.column})


def _message(message: Mapping[str, Any], where: str, key: str) -> dict[str, str]:
    said = {name: value for name, value in message.items() if value is not None}  # `datasets` fills up with None
    if set(said) != {"role", "content"} or not all(isinstance(value, str) for value in said.values()):
        raise ConfigError(f"{key}.path", f'{where} is {said!r}: a message has a "role" and a "content", both texts')
    return said


def _read(config: PromptsConfig, key: str) -> list[Mapping[str, Any]]:
    path = Path(config.path)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ConfigError(f"{key}.path", f"{path} ends in none of {', '.join(_BUILDERS)}")
    if path.suffix in _BUILDERS and not path.exists():
        raise ConfigError(f"{key}.path", f"{path} is not there")
    if path.suffix == ".jsonl":
        return _read_lines(path, key)
    return _read_dataset(path, config, key)


def _read_lines(path: Path, key: str) -> list[Mapping[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_json_object(line, f"{path}, line {number},", key))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}.path", f"{path} cannot be read: {error}") from error
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]  # what a row leaves out is None there


def _json_object(line: str, where: str, key: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{key}.path", f"{where} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{key}.path", f"{where} is no JSON object: {line.strip()[:80]}")
    return found


def _read_dataset(path: Path, config: PromptsConfig, key: str) -> list[Mapping[str, Any]]:
    import datasets  # takes a second and a hundred megabytes, and is of the extra `trainer`

    datasets.disable_progress_bars()
    try:
        if path.exists():
            # What is on this machine is read as it is now, through a cache that nobody else sees.
            with tempfile.TemporaryDirectory() as cache:
                return list(_local(path, config.split, cache))
        return list(datasets.load_dataset(config.path, split=config.split))
    except (StopIteration, IndexError):  # how `datasets` says that a file or a saved table is empty
        return []
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{key}.path", f"{config.path} cannot be read: {error}") from error
    finally:
        datasets.enable_progress_bars()


def _local(path: Path, split: str, cache: str) -> Any:
    import datasets

    if path.is_file():
        kind = _BUILDERS[path.suffix]
        return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True)
    if (path / "dataset_dict.json").exists():  # written by DatasetDict.save_to_disk
        return datasets.load_from_disk(str(path), keep_in_memory=True)[split]
    if (path / "state.json").exists():  # written by Dataset.save_to_disk
        return datasets.load_from_disk(str(path), keep_in_memory=True)
    return datasets.load_dataset(str(path), split=split, cache_dir=cache, keep_in_memory=True)


class PromptOrder:
    """An endless, seeded order of rows: every pass goes through all of them, each time in another order.

    The order depends on nothing but the seed and the position, so a run that is resumed needs only its position.
    """

    def __init__(self, rows: Sequence[PromptRow], seed: int) -> None:
        self._rows = rows
        self._seed = seed

    def take(self, position: int, count: int) -> list[PromptRow]:
        """Rows `position` to `position + count` of the order."""
        taken: list[PromptRow] = []
        while len(taken) < count:
            epoch, offset = divmod(position + len(taken), len(self._rows))
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
            taken += [self._rows[index] for index in order[offset : offset + count - len(taken)]]
        return taken
