"""An adapter's directory on this machine: what an upload reads, and what a download writes."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

from onebase.client import types as t
from onebase.client.errors import (
    AlreadyExistsError,
    DataLossError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIMIZER, CLIENT_STATE = "optimizer.safetensors", "client_state.bin"
_MORE = ("value_head.safetensors", "onebase.json")
_PICKLES = (".bin", ".pt", ".pth")

CHUNK = 2**20
"""Bytes of a message of an upload."""


@dataclass(frozen=True)
class File:
    """A file of an adapter: its name, its length in bytes and its SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Outgoing:
    """The files of a directory as they are now, to be uploaded."""

    path: Path
    files: tuple[File, ...]

    def pieces(self) -> Iterator[bytes]:
        """Their bytes, laid end to end; each time from the beginning."""
        for one in self.files:
            with (self.path / one.name).open("rb") as file:
                while piece := file.read(CHUNK):
                    yield piece


def outgoing(path: str | os.PathLike[str], *, with_optimizer: bool) -> Outgoing:
    """Looks at a directory that PEFT's `save_pretrained`, or a server, has written. Reads all of it, for the hashes.

    Raises:
        NotFoundError: it is none, or has no adapter_config.json or no safetensors file.
        InvalidArgumentError: its weights are in a pickle file, which can run code, and which no server opens.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise NotFoundError(
            f"{folder} has no {CONFIG}: give a directory that PEFT's save_pretrained wrote",
            reason="PATH_NOT_FOUND",
            field="path",
        )
    if not (folder / WEIGHTS).is_file():
        pickles = [one.name for one in folder.iterdir() if one.suffix in _PICKLES and one.name != CLIENT_STATE]
        if pickles:
            raise InvalidArgumentError(
                f"{folder} holds {pickles[0]}, a pickle file, which can run code and is never opened: save it again "
                "with safe_serialization=True",
                reason="PICKLE_ADAPTER",
                field="path",
            )
        raise NotFoundError(f"{folder} has no {WEIGHTS}", reason="WEIGHTS_NOT_FOUND", field="path")
    names = [CONFIG, WEIGHTS, *_MORE, *([OPTIMIZER, CLIENT_STATE] if with_optimizer else [])]
    return Outgoing(folder, tuple(_describe(folder / name) for name in names if (folder / name).is_file()))


def _describe(path: Path) -> File:
    with path.open("rb") as file:
        return File(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Header:
    """How a download begins: the version that comes, and its files in the order of their bytes."""

    adapter: t.AdapterVersion
    files: Sequence[File]


Part: TypeAlias = "Header | bytes"
"""A message of a download."""


class Incoming:
    """A download on its way into a directory, which is there whole, when all was checked, or not at all.

    Args:
        path: where it shall be; its parents are made.
        overwrite: replace the adapter that is there.

    Raises:
        AlreadyExistsError: the path is taken, and `overwrite` is not set or what is there is no adapter.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        self.path = Path(path).absolute()
        self._overwrite = overwrite
        self._check_free()
        token = uuid.uuid4().hex
        self._fresh = self.path.with_name(f".{self.path.name}.{token}.new")
        self._old = self.path.with_name(f".{self.path.name}.{token}.old")
        self._header: Header | None = None
        self._rest: list[File] = []  # the file under way, and those after it
        self._out: BinaryIO | None = None
        self._written = 0  # of the file under way
        self._hash = hashlib.sha256()

    def __enter__(self) -> Incoming:
        self._fresh.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.close()
        shutil.rmtree(self._fresh, ignore_errors=True)  # after `finish`, it is not there any more

    def take(self, part: Part) -> None:
        """Takes the next message.

        Raises:
            DataLossError: a file is not what its hash says.
            InternalError: what the server sends makes no sense.
        """
        if isinstance(part, Header):
            if self._header is not None or any(not _plain(one.name) for one in part.files):
                raise InternalError("the server began a download in a way that this client does not know; is it newer?")
            self._header, self._rest = part, list(part.files)
            return
        rest = memoryview(part)
        while rest:
            if not self._rest:
                raise InternalError("the server sent more bytes than its files have")
            rest = rest[self._write(self._rest[0], rest) :]

    def _write(self, now: File, data: memoryview) -> int:
        """Writes what belongs to the file under way; how many bytes that were."""
        if self._out is None:
            self._out = (self._fresh / now.name).open("xb")
        part = data[: now.bytes - self._written]
        self._out.write(part)
        self._hash.update(part)
        self._written += len(part)
        if self._written == now.bytes:
            self._end_file(now, self._out)
        return len(part)

    def _end_file(self, now: File, out: BinaryIO) -> None:
        if self._hash.hexdigest() != now.sha256:
            raise DataLossError(f"{now.name} came in another form than its hash says: download it again")
        out.flush()
        os.fsync(out.fileno())
        out.close()
        self._out, self._written, self._hash = None, 0, hashlib.sha256()
        del self._rest[0]

    def finish(self) -> t.SavedAdapter:
        """Puts the directory in its place, after the last message.

        Raises:
            AlreadyExistsError: the path was taken meanwhile.
            DataLossError: bytes are missing.
        """
        if self._header is None or self._rest:
            missing = ", ".join(one.name for one in self._rest) or "all"
            raise DataLossError(f"the download ended early, without {missing}: download it again")
        self._check_free()
        if self.path.exists():
            self.path.rename(self._old)
        self._fresh.rename(self.path)
        shutil.rmtree(self._old, ignore_errors=True)
        size = sum(one.bytes for one in self._header.files)
        return t.SavedAdapter(path=str(self.path), adapter=self._header.adapter, bytes=size)

    def _check_free(self) -> None:
        if not self.path.exists():
            return
        if not self._overwrite:
            raise AlreadyExistsError(
                f"{self.path} is taken: choose another, or set overwrite", reason="PATH_TAKEN", field="path"
            )
        if not (self.path / CONFIG).is_file():
            raise AlreadyExistsError(
                f"{self.path} is not an adapter, and is left alone: choose another path",
                reason="PATH_TAKEN",
                field="path",
            )


def _plain(name: str) -> bool:
    """Whether it names a file in a directory, and nothing outside it."""
    return bool(name) and name == Path(name).name and not name.startswith(".")
