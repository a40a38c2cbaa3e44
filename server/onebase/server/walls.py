"""A tenant's own directory under a root, ROOT/TENANT: reached a step at a time, so that no symlink is ever followed.

Whoever owns a directory may change it at any moment: between a look at it and its use a directory becomes a symlink, a
file grows, shrinks or is swapped. So what is read is copied first, from files that are held open, to where the server
alone writes; and what is written is made where the server alone writes, and moved in one step into a directory that is
held open. ROOT itself must be the server's own.

Everything here may wait for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onebase.server.directories import exchange
from onebase.server.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    disk_full,
)

MANIFEST = "onebase.json"
STAMP = "stamp"
"""In a manifest: of the call that saved the directory. Who may write the directory may write this too, for itself."""

OURS = ("adapter_config.json", MANIFEST)
"""Only a directory that has one of these is ever overwritten."""
_READ = (".json", ".safetensors", ".jinja")
_REFUSED_BY_NAME = (".bin", ".pt", ".pth")  # pickles: their names are copied, so that they are refused by name
_MAX_TEXT = 64 * 2**20
_CHUNK = 2**20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not make anybody wait


@dataclass(frozen=True)
class Place:
    """A path in a tenant's own directory. `parts` has no "..", and is empty for that directory itself."""

    root: Path
    tenant: str
    parts: tuple[str, ...]
    shown: str
    """The path as its client gave it, for messages."""

    @property
    def path(self) -> Path:
        """Where it is, for people."""
        return self.root.joinpath(self.tenant, *self.parts)

    def bytes_there(self) -> int:
        """How many bytes `copy_to` would copy just now.

        Raises:
            NotFound: PATH_NOT_FOUND.
            PermissionDenied: PATH_OUTSIDE_ROOTS.
        """
        with _told(), self._opened(self.parts, make=False) as here:
            names = [name for name in os.listdir(here) if os.path.splitext(name)[1] in _READ]
            return sum(os.stat(name, dir_fd=here, follow_symlinks=False).st_size for name in names)

    def copy_to(self, folder: Path, limit: int) -> None:
        """Copies what an adapter may consist of into a directory that only the server writes.

        Raises:
            NotFound: PATH_NOT_FOUND.
            PermissionDenied: PATH_OUTSIDE_ROOTS: there is a link of either kind: what it leads to may be another's.
            ResourceExhausted: LIMIT_EXCEEDED: it has more bytes than `limit`.
        """
        with _told(), self._opened(self.parts, make=False) as here:
            for name in sorted(os.listdir(here)):
                suffix = os.path.splitext(name)[1]
                if suffix in _REFUSED_BY_NAME:
                    (folder / name).touch()
                elif suffix in _READ:
                    limit -= self._copy(here, name, folder, limit)

    def _copy(self, here: int, name: str, folder: Path, limit: int) -> int:
        try:
            source = os.open(name, _FILE, dir_fd=here)
        except OSError as error:
            raise self._no_way() if error.errno in (errno.ELOOP, errno.ENXIO) else error from None
        with os.fdopen(source, "rb") as data, (folder / name).open("xb") as out:
            there = os.fstat(source)
            if not stat.S_ISREG(there.st_mode) or there.st_nlink != 1:
                raise self._no_way()
            if not name.endswith(".safetensors"):
                limit = min(limit, _MAX_TEXT)
            done = 0
            while piece := data.read(_CHUNK):
                done += len(piece)
                if done > limit:
                    raise ResourceExhausted(
                        "LIMIT_EXCEEDED",
                        f"path {self.shown!r} holds more bytes than this server takes: leave the optimizer's out, or "
                        "serve with more --max-upload-bytes",
                        field="path",
                    )
                out.write(piece)
        return done

    def bytes_below(self) -> int:
        """Bytes of the files here and below; 0 where there is no directory.

        Raises:
            PermissionDenied: PATH_OUTSIDE_ROOTS: there is a link on the way.
        """
        try:
            with _told(), self._opened(self.parts, make=False) as here:
                return _bytes_in(here)
        except NotFound:
            return 0

    def saved(self, stamp: str) -> tuple[int, int] | None:
        """What a call of this stamp has saved here: its version and its bytes; None if it is not here.

        Raises:
            OnebaseError: as `check_free`.
        """
        with _told(), self._opened(self.parts, make=False) as here:
            return saved_in(here, stamp)

    def check_free(self, *, overwrite: bool) -> None:
        """Refuses a place that nothing may be written to.

        Raises:
            AlreadyExists: PATH_TAKEN.
            FailedPrecondition: NOT_AN_ADAPTER for a directory that is there and holds no adapter.
            PermissionDenied: PATH_OUTSIDE_ROOTS.
        """
        with _told(), self._opened(self.parts[:-1], make=True) as parent:
            self._check_free(parent, overwrite=overwrite)

    def take(self, made: Path, *, overwrite: bool) -> None:
        """Moves a directory here that was made on the root's own file system, in the place of what is overwritten.

        Raises:
            OnebaseError: as `check_free`.
        """
        name = self.parts[-1]
        with _told(), self._opened(self.parts[:-1], make=True) as parent:
            if not self._check_free(parent, overwrite=overwrite):
                os.rename(made, name, dst_dir_fd=parent)
                os.fsync(parent)
                return
            if exchange(str(made), name, other_in=parent):
                os.fsync(parent)
            else:
                self._take_in_turns(made, parent)
            shutil.rmtree(made, ignore_errors=True)  # where nobody else can put anything in its way

    def _take_in_turns(self, made: Path, parent: int) -> None:
        """Moves a directory here, and what was here to where that was: where two cannot be exchanged in one step."""
        name = self.parts[-1]
        old = f".{name}.{uuid.uuid4().hex}.old"
        os.rename(name, old, src_dir_fd=parent, dst_dir_fd=parent)
        try:
            os.rename(made, name, dst_dir_fd=parent)
        except OSError:
            os.rename(old, name, src_dir_fd=parent, dst_dir_fd=parent)
            raise
        os.fsync(parent)
        os.rename(old, made, src_dir_fd=parent)

    def _check_free(self, parent: int, *, overwrite: bool) -> bool:
        """Whether an adapter is there that may be overwritten."""
        name = self.parts[-1]
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(there.st_mode):
            raise self._no_way()
        with _opened(name, parent) as folder:
            names = os.listdir(folder)
        if names and not any(one in names for one in OURS):
            raise FailedPrecondition(
                "NOT_AN_ADAPTER",
                f"path {self.shown!r} is a directory that holds no adapter, and is never overwritten: give a new path",
                field="path",
            )
        if not overwrite:
            raise AlreadyExists(
                "PATH_TAKEN", f"{self.shown!r} is taken: choose another path, or set overwrite", field="path"
            )
        return True

    @contextlib.contextmanager
    def _opened(self, parts: tuple[str, ...], *, make: bool) -> Iterator[int]:
        """A directory of the tenant's own, held open."""
        with contextlib.ExitStack() as held:
            here = held.enter_context(_opened(str(self.root), None))
            for depth, name in enumerate((self.tenant, *parts)):
                if make or not depth:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o777 if depth else 0o700, dir_fd=here)
                        os.fsync(here)
                try:
                    here = held.enter_context(_opened(name, here))
                except FileNotFoundError:
                    raise NotFound(
                        "PATH_NOT_FOUND",
                        f"path {self.shown!r} is not a directory: give one that PEFT's save_pretrained wrote",
                        field="path",
                    ) from None
                except OSError as error:
                    raise self._no_way() if error.errno in (errno.ELOOP, errno.ENOTDIR) else error from None
            yield here

    def _no_way(self) -> PermissionDenied:
        return PermissionDenied(
            "PATH_OUTSIDE_ROOTS",
            f"path {self.shown!r} is not of plain directories and files alone: links of either kind are not followed "
            "here; copy what they lead to",
            field="path",
        )


def saved_at(path: Path, stamp: str) -> tuple[int, int] | None:
    """`saved_in` for a directory of the operator's."""
    try:
        with _opened(str(path), None) as folder:
            return saved_in(folder, stamp)
    except OSError:
        return None


def saved_in(folder: int, stamp: str) -> tuple[int, int] | None:
    """What a call of this stamp has saved in an open directory: its version and its bytes; None if it is another's."""
    try:
        with os.fdopen(os.open(MANIFEST, _FILE, dir_fd=folder), "rb") as file:
            manifest = json.loads(file.read(_MAX_TEXT))
    except (OSError, ValueError):
        return None
    version = manifest.get("version") if isinstance(manifest, dict) and manifest.get(STAMP) == stamp else None
    if not isinstance(version, int):
        return None
    return version, _bytes_in(folder)


def bytes_of(path: Path) -> int:
    """Bytes of the files in a directory of the server's own, and below it."""
    with _opened(str(path), None) as folder:
        return _bytes_in(folder)


def _bytes_in(folder: int) -> int:
    """Bytes of the files in an open directory and below it; no link is followed, and what goes meanwhile has none."""
    size = 0
    for _, _, names, below in os.fwalk(dir_fd=folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(name, dir_fd=below, follow_symlinks=False).st_size
    return size


@contextlib.contextmanager
def _opened(name: str, within: int | None) -> Iterator[int]:
    descriptor = os.open(name, _DIRECTORY if within is not None else os.O_RDONLY | os.O_DIRECTORY, dir_fd=within)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the disk says, in words for a client."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            raise InvalidArgument(
                "BAD_PATH", f"path leads nowhere ({error.strerror}): use shorter names", field="path"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PermissionDenied(
                "PATH_OUTSIDE_ROOTS", "path is not the server's to use: its operator must let it", field="path"
            ) from error
        raise disk_full(error) from error
