"""Memory that runs out, in a step or beside one: how it is told from other errors, and what a client is told of it.

Knows no torch: such an error is told by its class's name and its words. Its traceback holds the tensors of the step
that failed, so nothing may be tried again before it is let go.
"""

from __future__ import annotations

import errno
import re

from onebase.server.errors import ResourceExhausted

RETRY_SECONDS = 5.0
"""After which a job may find room that others had."""

_CLASSES = ("OutOfMemoryError",)  # torch's, of every device that has one
_TEXTS = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|_ALLOC_FAILED|bad_alloc|can't start new thread",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ [KMGT]?i?B(?:ytes)?)\b", re.IGNORECASE)
_POISON = re.compile(
    r"device-side assert|illegal memory access|illegal instruction|misaligned address|invalid program counter|"
    r"launch fail|launch timed out|ECC error|hardware stack error|unspecified launch|CUDA error: unknown error",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of the device or of the host."""
    if isinstance(error, MemoryError) or any(one.__name__ in _CLASSES for one in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return bool(_is_foreign(error) and _TEXTS.search(str(error)))


def is_poison(error: BaseException) -> bool:
    """Whether an error leaves the process without a device that can be trusted, as some of CUDA's do."""
    return bool(isinstance(error, RuntimeError) and _POISON.search(str(error)))


def _is_foreign(error: BaseException) -> bool:
    """RuntimeError is what C++ raises, and safetensors has a class of its own."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("safetensors")


def out_of_memory(what: str, error: str, way_out: str, *, retry: bool) -> ResourceExhausted:
    """What a client is told.

    Args:
        what: found no room, such as "a prompt of 4000 tokens".
        error: what the allocator said.
        way_out: what would need less.
        retry: whether others had memory that they will give back.
    """
    asked = _ASKED.search(error)
    tried = f" (the last thing it asked for was {asked[1]})" if asked else ""
    return ResourceExhausted(
        "OUT_OF_MEMORY",
        f"the server's memory has no room for {what}{tried}; nothing was changed: {way_out}",
        retry_after=RETRY_SECONDS if retry else None,
    )
