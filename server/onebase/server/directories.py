"""Directories: made so that a power cut does not take them back, and exchanged so that neither place is ever empty.

Knows nothing of what is in them. Everything here may wait for the disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_HERE = -100  # AT_FDCWD: names are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""What a kernel, a sandbox or a file system says that does not know how to exchange."""


def sync(path: Path) -> None:
    """Has the disk keep a file, or which names a directory has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make(path: Path, mode: int = 0o777) -> None:
    """Makes a directory where there is none, and those above it; each is kept by the disk.

    Args:
        path: where.
        mode: of the directory itself; those above it are as all others.

    Raises:
        OSError: it cannot be made.
    """
    if path.is_dir():
        return
    make(path.parent)
    path.mkdir(mode, exist_ok=True)
    sync(path.parent)


def exchange(one: str, other: str, *, other_in: int = _HERE) -> bool:
    """Has two names trade what they mean, in one step; False where that cannot be had: then nothing has changed.

    Args:
        one: a path.
        other: another on the same file system.
        other_in: a descriptor of the directory in which `other` is, if it is no path.

    Raises:
        OSError: one of them is not there, or must not be changed.
    """
    if _renameat2 is None:
        return False
    if _renameat2(_HERE, os.fsencode(one), other_in, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), one, None, other)


_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
"""Linux's; the other systems' C libraries have none of that name."""
if _renameat2 is not None:
    _renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
