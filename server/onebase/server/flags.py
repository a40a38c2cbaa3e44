"""The flags of `onebase serve` that name adapters, as settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from onebase.server.config import AdapterSource, ConfigError, Quota, StateConfig
from onebase.server.jobs import Pooling
from onebase.server.sizes import size

T = TypeVar("T")

_NO_FLAGS = ("model", "adapter", "address")
_YES_OR_NO = {"yes": True, "no": False}
_POOLINGS = {rule.value: rule for rule in Pooling}


def sources(flag: str, values: list[str] | None, *, with_path: bool) -> tuple[AdapterSource, ...]:
    """The adapters that a repeated flag names, each NAME=PATH, or NAME alone unless it must be `with_path`.

    Raises:
        ConfigError: a path is missing.
    """
    found = []
    for value in values or ():
        name, equals, path = value.partition("=")
        if equals and not path:
            raise ConfigError(f"{flag} is {value!r}: give a directory after the '='")
        if with_path and not path:
            raise ConfigError(f"{flag} is {value!r}: give its directory too, as NAME=PATH")
        found.append(AdapterSource(name, Path(path) if path else None))
    return tuple(found)


def state_config(
    path: Path | None,
    durability: str,
    steps: int,
    seconds: float,
    keep: int,
    restore: list[str] | None,
    checkpoints: str = "",
    adopt: bool = False,
    *,
    evict_idle_seconds: float = 600.0,
    adapter_memory: int = 0,
) -> StateConfig | None:
    """The flags of durability as settings; None without --state.

    Raises:
        ConfigError: one that cannot work, or that needs --state.
    """
    if path is None:
        for flag, given in (
            ("--durability step", durability == "step"),
            ("--restore", bool(restore)),
            ("--checkpoints", bool(checkpoints)),
            ("--adopt", adopt),
            ("--adapter-memory", adapter_memory > 0),
        ):
            if given:
                raise ConfigError(f"{flag} needs a directory: give --state DIR too")
        return None
    chosen = []
    for value in restore or ():
        name, _, version = value.partition("=")
        if not version.isdigit():
            raise ConfigError(f"--restore is {value!r}: give it as NAME=VERSION")
        chosen.append((name, int(version)))
    return StateConfig(
        path,
        durability,
        steps,
        seconds,
        keep,
        tuple(chosen),
        checkpoints,
        adopt,
        evict_idle_seconds=evict_idle_seconds,
        adapter_memory=adapter_memory,
    )


def reward_sources(
    rewards: list[str] | None, append_eos: list[str] | None, pooling: list[str] | None
) -> tuple[AdapterSource, ...]:
    """The reward adapters, with what --reward-append-eos and --reward-pooling declare of them.

    Raises:
        ConfigError: a path is missing, a choice is none, or a name is not that of a reward.
    """
    named = sources("--reward", rewards, with_path=True)
    names = [source.name for source in named]
    eos = _choices("--reward-append-eos", append_eos, _YES_OR_NO, names)
    rules = _choices("--reward-pooling", pooling, _POOLINGS, names)
    return tuple(replace(one, append_eos=eos.get(one.name), pooling=rules.get(one.name)) for one in named)


def in_flags(message: str) -> str:
    """What settings say of a key, said of the command's flag."""
    key, found, rest = message.partition(" is ")
    if not found or key in _NO_FLAGS or not re.fullmatch("[a-z][a-z_]*", key):
        return message
    return f"--{key.replace('_', '-')} is {rest}"


def quota(flag: str, value: str) -> Quota:
    """A quota from NAME=NUMBER pairs with commas between; a number may end in K, M or G (powers of 1024).

    Raises:
        ConfigError: a name or a number is none.
    """
    found: dict[str, float] = {}
    names = [one.name for one in fields(Quota)]
    for pair in filter(None, value.split(",")):
        name, _, number = pair.partition("=")
        if name not in names:
            raise ConfigError(
                f"{flag} is {value!r}: {name!r} is no quota: use {', '.join(names)}, such as adapter_bytes=8G"
            )
        if name in found:
            raise ConfigError(f"{flag} is {value!r}: {name!r} is there twice: give each once, with commas between")
        try:
            found[name] = size(number)
        except ValueError as error:
            raise ConfigError(f"{flag} is {value!r}: {name}={number}: {error}") from None
    return Quota(**found)  # type: ignore[arg-type]  # whole numbers all of them


def _choices(flag: str, values: list[str] | None, known: Mapping[str, T], names: list[str]) -> dict[str, T]:
    """What each NAME=CHOICE of a flag says, by name."""
    found: dict[str, T] = {}
    for value in values or ():
        name, _, choice = value.partition("=")
        if choice not in known:
            raise ConfigError(f"{flag} is {value!r}: give NAME=CHOICE, with one of {', '.join(known)}")
        if name not in names:
            raise ConfigError(f"{flag} is {value!r}: no --reward has this name; give --reward {name}=PATH too")
        if name in found:
            raise ConfigError(f"{flag} is {value!r}: {name!r} was given before; say it once")
        found[name] = known[choice]
    return found
