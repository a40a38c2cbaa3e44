"""The checkpoints of a state directory: where they lie, whether they are whole, what is left over.

    DIR/lock                     held by the server that uses the directory
    DIR/registry.sqlite          see `store`
    DIR/checkpoints/UID-TOKEN/   immutable: a PEFT directory with its optimizer and its manifest, see `engine.formats`

A directory counts only if the store names it; anything else is a leftover and swept at the next start. Knows nothing of
what is inside a checkpoint but its manifest's hashes. Everything here may wait for the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from onebase.server.errors import DataLoss
from onebase.server.store import CheckpointRow

MANIFEST = "onebase.json"


class StateInUseError(Exception):
    """Another server uses the directory; the message names it."""


class StateDirectory:
    """A directory that one server uses, from now until `close`.

    Args:
        path: made if it is not there, for this user alone: the store holds the sessions' secrets.

    Raises:
        StateInUseError: another server uses it.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path.resolve()
        self.store_path = self.path / "registry.sqlite"
        self._folder = self.path / "checkpoints"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.store_path.touch(mode=0o600)  # also where somebody has made the directory for all to read
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise StateInUseError(
                f"another server (process {holder}) uses it: stop that one, or give a directory of its own"
            ) from None
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Lets another server use it; may be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def fresh(self, uid: int) -> Path:
        """Where the next checkpoint of an adapter shall be written."""
        return self._folder / f"{uid:06d}-{uuid.uuid4().hex[:12]}"

    def path_of(self, folder: str) -> Path:
        """Where a checkpoint is."""
        return self._folder / folder

    @contextlib.contextmanager
    def opened(self, folder: str) -> Iterator[Path]:
        """A checkpoint's directory on this machine's disk, for as long as the block runs."""
        yield self.path_of(folder)

    def row(self, path: Path, uid: int, version: int) -> CheckpointRow:
        """A checkpoint that was just written, as the store shall know it."""
        return CheckpointRow(path.name, uid, version, _sha256(path / MANIFEST))

    def verify(self, row: CheckpointRow) -> None:
        """Sees to it that a checkpoint is what was written, every file of it.

        Raises:
            DataLoss: CHECKPOINT_DAMAGED, naming the file.
        """
        path = self.path_of(row.folder)
        try:
            wanted = {MANIFEST: row.digest}
            if _sha256(path / MANIFEST) == row.digest:
                wanted |= json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
            for name, digest in wanted.items():
                if _sha256(path / name) != digest:
                    raise _damaged(row, f"{path / name} is not what was written")
        except OSError as error:
            raise _damaged(row, f"{error.filename or path}: {error.strerror}") from error

    def remove(self, folders: Iterable[str]) -> None:
        """Deletes checkpoints that the store does not name any more."""
        for folder in folders:
            shutil.rmtree(self.path_of(folder), ignore_errors=True)

    def sweep(self, known: Collection[str]) -> list[str]:
        """Deletes what the store does not name: of a server that ended before its commit. Returns the names."""
        leftovers = sorted(one.name for one in self._folder.iterdir() if one.name not in known)
        for name in leftovers:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._folder / name)
        return leftovers


def _damaged(row: CheckpointRow, what: str) -> DataLoss:
    return DataLoss("CHECKPOINT_DAMAGED", f"the checkpoint of version {row.version} is damaged: {what}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
