"""Directories for what does not outlive the process: they go with it, or the next one sweeps them, also after kill -9.

    PARENT/lock   held while a process's directory comes, and while those of dead processes go
    PARENT/XXXX/  of one process, which holds a lock on it for as long as it lives

Such a lock (flock) ends with its process, however that ends, and is never another's, as a process id may be.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from onebase.server.config import ConfigError

log = logging.getLogger(__name__)

_LOCK = "lock"


def of_this_user() -> Path:
    """Where the scratch directories of this user's servers lie, in the system's temporary directory (TMPDIR)."""
    return Path(tempfile.gettempdir()) / f"onebase-{os.getuid()}"


class Scratch:
    """A directory of this process alone, made when it is first needed. Any thread may use it.

    Args:
        parent: where it lies, beside those of other servers of this user.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._path: Path | None = None
        self._held = -1
        self._lock = threading.Lock()

    def sweep(self) -> list[str]:
        """Deletes the directories whose processes are gone; returns their names.

        Raises:
            ConfigError: the parent is not this user's own.
            OSError: it cannot be made.
        """
        with self._births() as folder:
            dead = [one for one in sorted(folder.iterdir()) if one.is_dir() and not one.is_symlink() and _dead(one)]
            for one in dead:
                shutil.rmtree(one, ignore_errors=True)
        if dead:
            log.warning("%d directories in %s were left by a server that was killed, and are gone", len(dead), folder)
        return [one.name for one in dead]

    def fresh(self) -> Path:
        """A new directory, empty.

        Raises:
            OSError: it cannot be made.
        """
        with self._lock:
            if self._path is None:
                with self._births() as folder:
                    self._path = Path(tempfile.mkdtemp(dir=folder))
                    self._held = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
                    fcntl.flock(self._held, fcntl.LOCK_EX)
            return Path(tempfile.mkdtemp(dir=self._path))

    def close(self) -> None:
        """Deletes what is left; may be called twice."""
        with self._lock:
            if self._path is not None:
                shutil.rmtree(self._path, ignore_errors=True)
                os.close(self._held)
                self._path, self._held = None, -1

    @contextlib.contextmanager
    def _births(self) -> Iterator[Path]:
        """The parent, in which nothing comes or goes meanwhile but by this thread."""
        self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = self._parent.lstat()
        if self._parent.is_symlink() or there.st_uid != os.getuid() or there.st_mode & 0o077:
            raise ConfigError(
                f"temporary directory is {str(self._parent)!r}: it is not this user's alone (owner, mode 0700); remove "
                "it, or set TMPDIR"
            )
        lock = os.open(self._parent / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._parent
        finally:
            os.close(lock)


def _dead(folder: Path) -> bool:
    """Whether no process holds this directory."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
