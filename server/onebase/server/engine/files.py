"""An adapter's files: read with every check before a tensor is made; and directories written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from onebase.server import failpoints
from onebase.server.directories import exchange, make, sync
from onebase.server.engine.tensors import StoredTensors
from onebase.server.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, disk_full
from onebase.server.jobs import MAX_CLIENT_STATE

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CLIENT_STATE = "client_state.bin"
MANIFEST = "onebase.json"

_MANIFEST_TYPES = {"version": (int, "an integer"), "base": (dict, "an object"), "sha256": (dict, "an object")}
_MAX_JSON = 16 * 2**20  # bytes; a parsed object takes many times as many
_MAX_VERSION = 2**53  # leaves a version room to grow in 64 bits


class SavedFiles:
    """The files of one adapter directory.

    Raises:
        NotFound: there is no such directory, or no adapter in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise NotFound(
                "PATH_NOT_FOUND", f"{path} is not a directory: give one that PEFT's save_pretrained wrote", field="path"
            )
        self._hashes: dict[str, str] = self.manifest().get("sha256", {})

    def manifest(self) -> dict[str, Any]:
        """onebase.json; empty where PEFT wrote the directory.

        Raises:
            InvalidArgument: an entry that is read here is not of its type.
        """
        found = self._json(MANIFEST) if (self.path / MANIFEST).exists() else {}
        for key, (kind, wanted) in _MANIFEST_TYPES.items():
            if key in found and not isinstance(found[key], kind):
                raise InvalidArgument("BAD_MANIFEST", f"{self.path / MANIFEST}: {key} is not {wanted}", field="path")
        if not all(isinstance(value, str) for value in found.get("base", {}).values()):
            raise InvalidArgument("BAD_MANIFEST", f"{self.path / MANIFEST}: base holds more than texts", field="path")
        if not 0 <= found.get("version", 0) <= _MAX_VERSION:
            raise InvalidArgument(
                "BAD_MANIFEST",
                f"{self.path / MANIFEST}: version is {found['version']}: use 0 to {_MAX_VERSION}",
                field="path",
            )
        return found

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        if not (self.path / CONFIG).exists():
            raise NotFound("CONFIG_NOT_FOUND", f"{self.path} has no {CONFIG}: it is no PEFT adapter", field="path")
        return self._json(CONFIG)

    def adapter(self) -> Path:
        """The adapter's safetensors file.

        Raises:
            InvalidArgument: there is only a pickle file, which is never opened.
        """
        path = self.path / ADAPTER
        if path.exists():
            return path
        pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        pickles = [name for name in pickles if name != CLIENT_STATE]
        if pickles:
            raise InvalidArgument(
                "PICKLE_ADAPTER",
                f"{self.path} holds {pickles[0]}, a pickle file, which can run code and is never opened: "
                "save it again with safe_serialization=True",
                field="path",
            )
        raise NotFound("WEIGHTS_NOT_FOUND", f"{self.path} has no {ADAPTER}", field="path")

    def tensors(self, path: Path, expected: int) -> StoredTensors:
        """A safetensors file's tensors, after its hash was compared with the manifest's.

        Args:
            path: the file.
            expected: how many there are of such an adapter.

        Raises:
            DataLoss: the hash does not match.
            InvalidArgument: it is not a whole safetensors file, or names far more.
        """
        self._check_hash(path)
        return StoredTensors(path, expected)

    def client_state(self) -> bytes:
        """What its trainer kept with the adapter; empty where it kept nothing.

        Raises:
            DataLoss: the hash does not match.
            InvalidArgument: it is too long.
        """
        path = self.path / CLIENT_STATE
        if not path.exists():
            return b""
        if path.stat().st_size > MAX_CLIENT_STATE:
            raise InvalidArgument(
                "CLIENT_STATE_TOO_LONG",
                f"{path} has {path.stat().st_size} bytes: at most {MAX_CLIENT_STATE} are kept with an adapter",
                field="path",
            )
        self._check_hash(path)
        return path.read_bytes()

    def _check_hash(self, path: Path) -> None:
        wanted = self._hashes.get(path.name)
        if wanted is not None and sha256(path) != wanted:
            raise DataLoss(
                "HASH_MISMATCH", f"{path} is not what {MANIFEST} says it is: load another checkpoint", field="path"
            )

    def _json(self, name: str) -> dict[str, Any]:
        size = (self.path / name).stat().st_size
        if size > _MAX_JSON:
            raise InvalidArgument(
                "BAD_JSON", f"{self.path / name} has {size} bytes, and {_MAX_JSON} are the most", field="path"
            )
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # brackets a thousand deep
            raise InvalidArgument("BAD_JSON", f"{self.path / name} is not JSON: {error}", field="path") from error
        if not isinstance(found, dict):
            raise InvalidArgument("BAD_JSON", f"{self.path / name} is not a JSON object", field="path")
        return found


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_FULL = re.compile(rf"(os error|code:) {errno.ENOSPC}\b")
"""What safetensors says of a full disk, for which it has no error of its own."""

_SWAP = threading.Lock()
"""Held while a directory takes its place: several are written at once, perhaps to one path."""


def write_directory(path: Path, fill: Callable[[Path], object], manifest: Mapping[str, Any], *, overwrite: bool) -> int:
    """Writes a directory beside its place, makes it durable, and puts it there in one step.

    Args:
        path: where it shall be.
        fill: writes the files into an empty directory; not the manifest, which also gets their hashes.
        manifest: what onebase.json shall say.
        overwrite: replace what this server, or PEFT, has written there.

    Returns:
        Bytes written.

    Raises:
        AlreadyExists: the path is taken, and `overwrite` is not set or something else is there.
        ResourceExhausted: DISK_FULL; what was there is as it was.
    """
    with _SWAP:  # or the moment between another write's two renames looks like somebody else's directory
        _check_free(path, overwrite=overwrite)
    make(path.parent)
    token = uuid.uuid4().hex
    fresh, old = path.with_name(f".{path.name}.{token}.new"), path.with_name(f".{path.name}.{token}.old")
    try:
        fresh.mkdir()
        fill(fresh)
        hashes = {file.relative_to(fresh).as_posix(): sha256(file) for file in _files_below(fresh)}
        (fresh / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashes}, indent=2) + "\n", encoding="utf-8")
        size = sum(file.stat().st_size for file in _files_below(fresh))
        for one in (*fresh.rglob("*"), fresh):
            sync(one)
        with _SWAP:
            _check_free(path, overwrite=overwrite)
            failpoints.hit("before_rename")
            _take_place(fresh, path, old)
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, SafetensorError) and _FULL.search(str(error)):
            raise disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        if isinstance(error, OSError):
            raise disk_full(error) from error
        raise
    for replaced in (fresh, old):
        shutil.rmtree(replaced, ignore_errors=True)
    return size


def _take_place(fresh: Path, path: Path, old: Path) -> None:
    """Puts a directory at a path. What was there is at `fresh` then, or at `old` where two cannot be exchanged."""
    if not path.exists():
        fresh.rename(path)
    elif not exchange(str(fresh), str(path)):
        path.rename(old)
        fresh.rename(path)


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise AlreadyExists("PATH_TAKEN", f"{path} is taken: choose another, or set overwrite", field="path")
    if path.exists() and not any((path / name).exists() for name in (CONFIG, MANIFEST)):
        raise AlreadyExists(
            "PATH_TAKEN", f"{path} is not an adapter, and is left alone: choose another path", field="path"
        )


def _files_below(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file())
