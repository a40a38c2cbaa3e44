"""Checks of single numbers and texts of a request."""

from __future__ import annotations

import math

from google.protobuf.message import Message

from onebase.server.errors import InvalidArgument


def integer(value: int, field: str, *, least: int, most: int | None = None) -> int:
    """`value`, if it lies in [least, most].

    Raises:
        InvalidArgument: OUT_OF_RANGE.
    """
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise out_of_range(field, value, wanted)
    return value


def number(value: float, field: str, *, least: float | None = None, above: float | None = None) -> float:
    """`value`, if it is finite, at least `least`, and above `above`.

    Raises:
        InvalidArgument: NOT_FINITE; OUT_OF_RANGE.
    """
    finite(value, field)
    if least is not None and value < least:
        raise out_of_range(field, value, f"at least {least:g}")
    if above is not None and value <= above:
        raise out_of_range(field, value, f"a number above {above:g}")
    return value


def finite(value: float, field: str) -> float:
    """`value`, if it is neither NaN nor infinite.

    Raises:
        InvalidArgument: NOT_FINITE.
    """
    if not math.isfinite(value):
        raise InvalidArgument("NOT_FINITE", f"{field} is {value}: give a finite number", field=field)
    return value


def optional(message: Message, name: str, default: float) -> float:
    """The number of an `optional` field, or the default where it is not set."""
    value: float = getattr(message, name) if message.HasField(name) else default
    return value


def optional_int(message: Message, name: str) -> int | None:
    """The integer of an `optional` field, or None where it is not set."""
    value: int | None = getattr(message, name) if message.HasField(name) else None
    return value


def version(message: Message, name: str) -> int | None:
    """The adapter version that a request asks for, or None.

    Raises:
        InvalidArgument: OUT_OF_RANGE for a negative one.
    """
    value = optional_int(message, name)
    return None if value is None else integer(value, name, least=0)


def out_of_range(field: str, value: object, wanted: str) -> InvalidArgument:
    """The error of a value outside its range."""
    return InvalidArgument("OUT_OF_RANGE", f"{field} is {value}: use {wanted}", field=field)


def required(field: str, way_out: str) -> InvalidArgument:
    """The error of a field that must be set and is not."""
    return InvalidArgument("REQUIRED", f"{field} is not set: {way_out}", field=field)
