"""Where clients may have adapters loaded from and saved to: under the server's roots.

The operator uses the roots whole, symlinks followed first, and checked when a path is given: they are directories
that only the operator and the server write. Any other tenant has ROOT/TENANT of each (`walls`), and what is shared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from onebase.server.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from onebase.server.walls import OURS, Place

_MAX_LENGTH = 4096


class Roots:
    """The directories that clients may use.

    Args:
        roots: directories; they are resolved once, here.
        shared: directories to load from alone, for every tenant; resolved too.
    """

    def __init__(self, roots: Sequence[Path], shared: Sequence[Path] = ()) -> None:
        self._roots = tuple(root.resolve() for root in roots)
        self._shared = tuple(root.resolve() for root in shared)
        self._as_given = tuple(root.absolute() for root in roots)
        self._shared_as_given = tuple(root.absolute() for root in shared)

    def readable(self, path: str) -> Path:
        """The directory that the operator wants an adapter loaded from, resolved.

        Raises:
            InvalidArgument: BAD_PATH.
            FailedPrecondition: NO_ROOTS.
            PermissionDenied: PATH_OUTSIDE_ROOTS, of the directory or of a file that a symlink in it leads to.
        """
        roots = (*self._roots, *self._shared)
        resolved = self._resolve(path)
        if not _within(resolved, roots):
            raise _outside(path, roots)
        return resolved

    def writable(self, path: str) -> Path:
        """The directory that the operator wants an adapter saved to, resolved: under a root, and no root itself.

        Raises:
            InvalidArgument: BAD_PATH.
            FailedPrecondition: NO_ROOTS; NOT_AN_ADAPTER for a directory that is there and holds no adapter.
            PermissionDenied: PATH_OUTSIDE_ROOTS.
        """
        resolved = self._resolve(path)
        if not any(root in resolved.parents for root in self._roots):
            raise _outside(path, self._roots)
        ours = any((resolved / name).is_file() for name in OURS)
        if resolved.is_dir() and any(resolved.iterdir()) and not ours:
            raise FailedPrecondition(
                "NOT_AN_ADAPTER",
                f"path {path!r} is a directory that holds no adapter, and is never overwritten: give a new path",
                field="path",
            )
        return resolved

    def shared(self, path: str) -> Path | None:
        """A directory that the operator shares, resolved; None where the path names none.

        Raises:
            InvalidArgument: BAD_PATH.
            FailedPrecondition: NO_ROOTS.
        """
        self._check_form(path)
        plain = _plain(path)
        if not any(plain.is_relative_to(root) for root in (*self._shared, *self._shared_as_given)):
            return None
        resolved = self._resolve(path)
        return resolved if _within(resolved, self._shared) else None

    def place(self, path: str, tenant: str) -> Place:
        """A path in a tenant's own directories; whether anything is there is not looked at.

        Raises:
            InvalidArgument: BAD_PATH.
            FailedPrecondition: NO_ROOTS.
            PermissionDenied: PATH_OUTSIDE_ROOTS, of whatever is not the tenant's own, there or not.
        """
        self._check_form(path)
        names = (*zip(self._roots, self._roots, strict=True), *zip(self._as_given, self._roots, strict=True))
        homes = [(name / tenant, root) for name, root in names]
        for home, root in homes if os.path.isabs(path) else homes[:1]:
            plain = _plain(home / path)
            if plain.is_relative_to(home):
                return Place(root, tenant, plain.relative_to(home).parts, path)
        raise _outside(path, [*(root / tenant for root in self._roots), *self._shared])

    def own(self, path: str, tenant: str) -> Place:
        """As `place`, of a path that is not the tenant's whole directory: what may be written.

        Raises:
            OnebaseError: as `place`.
        """
        place = self.place(path, tenant)
        if not place.parts:
            raise _outside(path, [root / tenant for root in self._roots])
        return place

    def _check_form(self, path: str) -> None:
        if not (self._roots or self._shared):
            raise FailedPrecondition(
                "NO_ROOTS",
                "this server reads and writes no paths for clients: start it with --root DIR",
                field="path",
            )
        if not path:
            raise InvalidArgument(
                "BAD_PATH", "path is empty: give a directory under a root of the server", field="path"
            )
        if len(path) > _MAX_LENGTH or "\0" in path:
            raise InvalidArgument(
                "BAD_PATH", f"path is no path: use at most {_MAX_LENGTH} characters, none of them NUL", field="path"
            )

    def _resolve(self, path: str) -> Path:
        self._check_form(path)
        try:
            resolved = ((*self._roots, *self._shared)[0] / path).resolve()
            resolved.exists()  # fails for names that no file system takes
        except (OSError, RuntimeError):  # RuntimeError: a circle of symlinks
            raise InvalidArgument(
                "BAD_PATH", f"path {path!r} leads nowhere: check its symlinks and the length of its names", field="path"
            ) from None
        return resolved


def _outside(path: str, roots: Sequence[Path]) -> PermissionDenied:
    return PermissionDenied(
        "PATH_OUTSIDE_ROOTS",
        f"path {path!r} leads outside the server's roots: use a directory under one of "
        + (", ".join(str(root) for root in roots) or "those that --root names, of which there are none"),
        field="path",
    )


def _plain(path: str | Path) -> Path:
    """A path without "..", as it reads: no symlink is looked at."""
    return Path(os.path.normpath(path))


def _within(folder: Path, roots: Sequence[Path]) -> bool:
    """Whether a directory, and what symlinks in it lead to, is under one of the roots."""
    files = [one.resolve() for one in _links(folder)]
    return all(any(one.is_relative_to(root) for root in roots) for one in (folder, *files))


def _links(folder: Path) -> list[Path]:
    """The symlinks in a directory; none where there is no such directory."""
    try:
        return [one for one in folder.iterdir() if one.is_symlink()]
    except OSError:  # loading it says what is wrong
        return []
