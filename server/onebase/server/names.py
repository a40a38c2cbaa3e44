"""Adapter names: what is one, and which known one was meant by an unknown one.

A name is a word between client and server only. Nothing on disk is ever called after it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from onebase.server.errors import InvalidArgument

BASE_NAME = "base"
"""Means the base with no adapter; no adapter may be called so."""

MAX_NAME_LENGTH = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SHOWN = 20  # names listed in one message


def problem(name: str) -> str | None:
    """What keeps `name` from being an adapter's name, or None if nothing does."""
    if not name:
        return "is empty: give the adapter a name"
    if len(name) > MAX_NAME_LENGTH:
        return f"has {len(name)} characters: use at most {MAX_NAME_LENGTH}"
    if not _NAME.fullmatch(name):
        return "is not a name: use letters, digits, '.', '_' and '-', and begin with a letter or a digit"
    return None


def check_name(name: str, field: str) -> None:
    """Refuses what can be no adapter's name.

    Raises:
        InvalidArgument: with reason BAD_ADAPTER_NAME.
    """
    wrong = problem(name)
    if wrong:
        shown = name if len(name) <= MAX_NAME_LENGTH else name[:MAX_NAME_LENGTH] + "…"
        raise InvalidArgument("BAD_ADAPTER_NAME", f"{field} {shown!r} {wrong}", field=field)


def check_new_name(name: str, field: str) -> None:
    """Refuses what a new adapter may not be called: no name at all, or the reserved one.

    Raises:
        InvalidArgument: with reason BAD_ADAPTER_NAME.
    """
    check_name(name, field)
    if name == BASE_NAME:
        raise InvalidArgument(
            "BAD_ADAPTER_NAME",
            f"{field} {name!r} is reserved for the base with no adapter: use another name",
            field=field,
        )


def name_of(key: str) -> str:
    """The name in a key of the registry, which is \"tenant/name\", or the name itself."""
    return key.rpartition("/")[2]


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that says no `name` is there: near names if there are any, else the known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(one) for one in near) + "?"
    if not names:
        return "there are none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "there are " + ", ".join(names[:_SHOWN]) + more
