"""Plain mappings into frozen dataclasses: every key known, every value of its field's type, errors by dotted name.

Knows nothing of training: it reads dataclass fields and their annotations, and nothing else.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; names its key, its value and the way out."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


def require(condition: bool, key: str, problem: str) -> None:
    """Raises ConfigError(key, problem) unless the condition holds."""
    if not condition:
        raise ConfigError(key, problem)


def require_at_least(config: object, key: str, least: float) -> None:
    """Raises ConfigError unless the attribute `key` is a finite number and not below `least`."""
    value = getattr(config, key)
    require(math.isfinite(value) and value >= least, key, f"{value} is not {least} or more")


def require_above_zero(config: object, key: str) -> None:
    """Raises ConfigError unless the attribute `key` is None, or a finite number above 0."""
    value = getattr(config, key)
    require(value is None or (math.isfinite(value) and value > 0), key, f"{value} is not above 0")


def build(cls: type[T], data: object, where: str = "") -> T:
    """Makes the dataclass `cls` of a mapping.

    Args:
        cls: a dataclass whose annotations are plain types, Literals, optionals, tuples and other dataclasses.
        data: what YAML gave.
        where: dotted name of `data` in the whole configuration.

    Raises:
        ConfigError: an unknown, missing or ill-typed key; its dotted name is in the message.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(where, f"must be a mapping of settings, not {_show(data)}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass by contract
    for key in data:
        if key not in known:
            raise ConfigError(_join(where, str(key)), f"unknown key; {_nearest(str(key), list(known))}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _join(where, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(_join(where, name), "is required and has no default; set it in the file or by a flag")
    try:
        return cls(**values)
    except ConfigError as error:  # raised by the dataclass's own check, which does not know where it stands
        raise ConfigError(_join(where, error.key), error.problem) from None


def plain(config: object) -> Any:
    """The inverse of `build`: dataclasses as dicts and tuples as lists, ready for YAML or JSON."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, tuple):
        return [plain(item) for item in config]
    return config


def split_arguments(arguments: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """Reads a command line of one file and flags, `--a.b value` or `--a.b=value`, in any order.

    Returns:
        The file, and the flags as (dotted key, value) pairs.

    Raises:
        ConfigError: no file, more than one, or a flag without a value.
    """
    files, pairs = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            files.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise ConfigError(key, f"the flag needs a value; write --{key} VALUE")
            value = following
        pairs.append((key, value))
    if len(files) != 1:
        named = "no configuration is named" if not files else f"{', '.join(map(repr, files))} cannot all be the one"
        raise ConfigError("", f"{named}; write CONFIG.yaml --KEY VALUE, as in c.yaml --ppo.learning_rate 1e-4")
    return files[0], pairs


def override(data: dict[str, Any], key: str, value: object) -> None:
    """Sets a dotted key in nested mappings and lists, in place; mappings on the way are made if they are not there.

    Raises:
        ConfigError: where the way leads through something that holds no keys, or past the end of a list.
    """
    *way, last = key.split(".")
    here: Any = data
    for depth, part in enumerate(way):
        if isinstance(here, dict):
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        else:
            here = here[_index(here, part, ".".join(way[:depth]))]
    if isinstance(here, dict):
        here[last] = value
    else:
        here[_index(here, last, ".".join(way))] = value


def _index(items: object, part: str, where: str) -> int:
    if not isinstance(items, list):
        raise ConfigError(where, f"is {_show(items)}, so it has no key {part!r}")
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(where, f"is a list of {len(items)}; {part!r} is not one of its indexes")
    return int(part)


def _convert(hint: Any, value: object, key: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):  # the latter where one choice is a Literal
        (inner,) = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return None if value is None else _convert(inner, value, key)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(key, f"{_show(value)} is not one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str) and item is str:  # one text stands for a list of one
            return (value,)
        if not isinstance(value, list):
            raise ConfigError(key, f"must be a list, not {_show(value)}")
        return tuple(_convert(item, entry, f"{key}.{index}") for index, entry in enumerate(value))
    if is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, key)
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: object, key: str) -> bool | int | float | str:
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(key, f"must be true or false, not {_show(value)}")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ConfigError(key, f"must be a whole number, not {_show(value)}")
    if hint is float:
        return _number(value, key)
    if isinstance(value, str):
        return value
    raise ConfigError(key, f"must be text, not {_show(value)}; quote it if it looks like something else")


def _number(value: object, key: str) -> float:
    """YAML 1.1 reads 1e-4 as text, because it has no dot; here it is the number that it looks like."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError(key, f"must be a number, not {_show(value)}")


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _show(value: object) -> str:
    return "nothing" if value is None else repr(value)


def _join(where: str, key: str) -> str:
    return ".".join(part for part in (where, key) if part)
