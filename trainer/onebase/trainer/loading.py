"""A run's settings from a YAML file, the command line's flags and the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onebase.trainer.config import TrainConfig
from onebase.trainer.parsing import ConfigError, build, override

SERVER_VARIABLE = "ONEBASE_SERVER"


def load_config(path: str | Path, overrides: Iterable[tuple[str, str]] = ()) -> TrainConfig:
    """Reads a YAML file and sets (dotted key, YAML value) pairs over it.

    Raises:
        ConfigError: the file is not there, is not YAML, or holds a setting that cannot be used.

    Where neither names a server, the environment's ONEBASE_SERVER does, as for every other command.
    """
    import yaml  # of the extra `trainer`, without which settings can still be made in Python

    def parse(text: str, what: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(what, f"is not YAML: {error}") from None

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    data = parse(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(str(path), f"must be a mapping of settings, not {data!r}")
    for key, value in overrides:
        override(data, key, parse(value, key))
    if SERVER_VARIABLE in os.environ:
        data.setdefault("server", os.environ[SERVER_VARIABLE])
    return build(TrainConfig, data)
