"""The checkpoints of a state directory: where they lie, whether they are whole, what is left over.

    DIR/lock                     held by the server that uses the directory
    DIR/registry.sqlite          see `store`
    DIR/checkpoints/UID-TOKEN/   immutable: a PEFT directory with its optimizer and its manifest, see `engine.formats`

With a URL, checkpoints lie there (see `storage`), and DIR/transit has what is on its way. A directory counts only if
the store names it; anything else is a leftover and swept at the next start. Knows nothing of what is inside a
checkpoint but its manifest's hashes, and not what kind of storage it has. Everything here may wait for a disk or a
network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from onebase.server.directories import make, sync
from onebase.server.errors import DataLoss, Unavailable
from onebase.server.storage import Bucket, Disk
from onebase.server.store import AdapterRow, CheckpointRow

MANIFEST = "onebase.json"
_FAR = 5
"""So many older checkpoints are looked at for one that is whole."""

_GONE = (errno.ENOENT, errno.ENOTDIR)
"""A file that is not there is damage. Whatever else keeps one from being read may pass, as too many open files do."""


class StateInUseError(Exception):
    """Another server uses the directory; the message names it."""


class StateDirectory:
    """A directory that one server uses, from now until `close`.

    Args:
        path: made if it is not there, for this user alone: the store holds the sessions' secrets.
        url: where checkpoints lie; "" is in the directory itself.

    Raises:
        StateInUseError: another server uses it.
        ConfigError: checkpoints cannot lie at that URL.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, url: str = "") -> None:
        make(path, 0o700)
        self.path = path.resolve()
        self.store_path = self.path / "registry.sqlite"
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
        try:
            self.storage = Bucket(url, self.path / "transit") if url else Disk(self.path / "checkpoints")
            sync(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another server use it; may be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def fresh(self, uid: int) -> Path:
        """Where on this machine's disk the next checkpoint of an adapter shall be written, for `put`."""
        return self.storage.place(f"{uid:06d}-{uuid.uuid4().hex[:12]}")

    def put(self, path: Path, adapter: AdapterRow, version: int) -> CheckpointRow:
        """Makes a checkpoint durable that was just written: returns it as the store shall know it.

        Raises:
            OnebaseError: Unavailable or ResourceExhausted, where it lies at a URL.
        """
        row = CheckpointRow(path.name, adapter.uid, version, _sha256(path / MANIFEST))
        self.storage.put(path.name, {"adapter": asdict(adapter), "checkpoint": asdict(row), "written": time.time()})
        return row

    @contextlib.contextmanager
    def opened(self, folder: str) -> Iterator[Path]:
        """A checkpoint's directory on this machine's disk, for as long as the block runs; its hashes are not compared.

        Raises:
            OnebaseError: Unavailable; DataLoss where it is gone.
        """
        with self.storage.opened(folder) as path:
            yield path

    @contextlib.contextmanager
    def verified(self, row: CheckpointRow) -> Iterator[Path]:
        """A checkpoint's directory on this machine's disk, every file of it what was written.

        Raises:
            DataLoss: CHECKPOINT_DAMAGED, naming the file: it is not there, or not what was written.
            OnebaseError: Unavailable (CHECKPOINT_UNREADABLE, STORE_AWAY, STORE_DENIED): nothing is known of it now.
        """
        with self.opened(row.folder) as path:
            try:
                wanted = {MANIFEST: row.digest}
                if _sha256(path / MANIFEST) == row.digest:
                    wanted |= json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
                for name, digest in wanted.items():
                    if _sha256(path / name) != digest:
                        raise _damaged(row, f"{self._shown(row)}/{name} is not what was written")
            except OSError as error:
                file = f"{self._shown(row)}/{Path(error.filename or '').name}"
                if error.errno in _GONE:
                    raise _damaged(row, f"{file}: {error.strerror}") from error
                raise _unreadable(row, f"{file}: {error.strerror}") from error
            yield path

    def verify(self, row: CheckpointRow) -> None:
        """Sees to it that a checkpoint is what was written, every file of it.

        Raises:
            OnebaseError: as `verified`.
        """
        with self.verified(row):
            pass

    def whole(self, rows: Sequence[CheckpointRow]) -> CheckpointRow | None:
        """The first of these checkpoints that is what was written; a few of them are looked at.

        Raises:
            OnebaseError: Unavailable.
        """
        for row in rows[:_FAR]:
            with contextlib.suppress(DataLoss):
                self.verify(row)
                return row
        return None

    def remove(self, folders: Iterable[str]) -> None:
        """Deletes checkpoints that the store does not name any more."""
        for folder in folders:
            self.storage.remove(folder)

    def sweep(self, known: Collection[str]) -> list[str]:
        """Deletes what the store does not name: of a server that ended before its commit. Returns the names.

        Raises:
            OnebaseError: Unavailable.
        """
        leftovers = [name for name in self.storage.names() if name not in known]
        self.remove(leftovers)
        return leftovers

    def _shown(self, row: CheckpointRow) -> str:
        return f"{self.storage.url or self.path / 'checkpoints'}/{row.folder}"


def offer(name: str, error: DataLoss, whole: CheckpointRow | None) -> DataLoss:
    """The error of an adapter's newest checkpoint, and which older one is whole."""
    if whole is None:
        return DataLoss(
            error.reason, f"adapter {name!r}: {error}; no older one is whole: delete or replace the adapter"
        )
    way_out = f"version {whole.version} is whole: start the server with --restore {name}={whole.version} to go on there"
    return DataLoss(error.reason, f"adapter {name!r}: {error}; {way_out}, or delete or replace the adapter")


def _damaged(row: CheckpointRow, what: str) -> DataLoss:
    return DataLoss("CHECKPOINT_DAMAGED", f"the checkpoint of version {row.version} is damaged: {what}")


def _unreadable(row: CheckpointRow, what: str) -> Unavailable:
    return Unavailable(
        "CHECKPOINT_UNREADABLE",
        f"the checkpoint of version {row.version} cannot be read now ({what}): nothing is lost that was durable; see "
        "to that on the server's machine, and try again",
        retry_after=5.0,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
