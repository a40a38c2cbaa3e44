"""Numbers of bytes as people write them; apart from `flags`, so that the command's help loads nothing else."""

from __future__ import annotations

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str | int) -> int:
    """A number, which may end in K, M or G (powers of 1024).

    Raises:
        ValueError: it is none.
    """
    whole = str(text)
    digits = whole.rstrip("KMG")
    if len(whole) - len(digits) > 1 or not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"{whole!r} is no size: give a whole number, which may end in K, M or G, such as 8G")
    return int(digits) * _UNITS[whole[len(digits) :]]
