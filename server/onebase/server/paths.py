"""Where clients may have adapters loaded from and saved to: under the server's roots, symlinks followed first.

A path is checked when it is given. Whoever can swap a directory under a root for a symlink between then and the
reading has the server's files anyway: roots are for directories that only the operator and the server write.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onebase.server.errors import FailedPrecondition, InvalidArgument, PermissionDenied

_MAX_LENGTH = 4096
_OUR_FILES = ("adapter_config.json", "onebase.json")
"""Only a directory that has one of these is ever overwritten."""


class Roots:
    """The directories that clients may use.

    Args:
        roots: directories; they are resolved once, here.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(root.resolve() for root in roots)

    def readable(self, path: str) -> Path:
        """The directory that a client wants an adapter loaded from, resolved.

        Raises:
            InvalidArgument: BAD_PATH.
            FailedPrecondition: NO_ROOTS.
            PermissionDenied: PATH_OUTSIDE_ROOTS, of the directory or of a file that a symlink in it leads to.
        """
        resolved = self._resolve(path)
        files = [one.resolve() for one in _links(resolved)]
        if not all(any(one.is_relative_to(root) for root in self._roots) for one in (resolved, *files)):
            raise self._outside(path)
        return resolved

    def writable(self, path: str) -> Path:
        """The directory that a client wants an adapter saved to, resolved: under a root, and no root itself.

        Raises:
            InvalidArgument: BAD_PATH.
            FailedPrecondition: NO_ROOTS; NOT_AN_ADAPTER for a directory that is there and holds no adapter.
            PermissionDenied: PATH_OUTSIDE_ROOTS.
        """
        resolved = self._resolve(path)
        if not any(root in resolved.parents for root in self._roots):
            raise self._outside(path)
        ours = any((resolved / name).is_file() for name in _OUR_FILES)
        if resolved.is_dir() and any(resolved.iterdir()) and not ours:
            raise FailedPrecondition(
                "NOT_AN_ADAPTER",
                f"path {path!r} is a directory that holds no adapter, and is never overwritten: give a new path",
                field="path",
            )
        return resolved

    def _resolve(self, path: str) -> Path:
        if not self._roots:
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
        try:
            resolved = (self._roots[0] / path).resolve()
            resolved.exists()  # fails for names that no file system takes
        except (OSError, RuntimeError):  # RuntimeError: a circle of symlinks
            raise InvalidArgument(
                "BAD_PATH", f"path {path!r} leads nowhere: check its symlinks and the length of its names", field="path"
            ) from None
        return resolved

    def _outside(self, path: str) -> PermissionDenied:
        return PermissionDenied(
            "PATH_OUTSIDE_ROOTS",
            f"path {path!r} leads outside the server's roots: use a directory under one of "
            + ", ".join(str(root) for root in self._roots),
            field="path",
        )


def _links(folder: Path) -> list[Path]:
    """The symlinks in a directory; none where there is no such directory."""
    try:
        return [one for one in folder.iterdir() if one.is_symlink()]
    except OSError:  # loading it says what is wrong
        return []
