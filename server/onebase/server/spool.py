"""An adapter's files on their way between a client and the engine: kept in a private directory, and never for long.

Reading, writing and hashing happen on other threads, a piece at a time, so that the event loop goes on with everybody
else's calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from onebase.server.errors import DataLoss, InvalidArgument, OnebaseError, ResourceExhausted
from onebase.server.scratch import Scratch

R = TypeVar("R")

CHUNK = 2**20
"""Bytes of a message of a download."""


@dataclass(frozen=True)
class SpooledFile:
    """A file of an adapter's directory; `sha256` is in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Spool:
    """A directory that only this user may read, deleted when its last user has left; made when it is first used.

    Args:
        scratch: where it lies.
        gone: called when it is deleted, or could not be made.
    """

    def __init__(self, scratch: Scratch, gone: Callable[[], None] = lambda: None) -> None:
        self._scratch = scratch
        self._gone = gone
        self._path: Path | None = None
        self._users = 0

    @contextlib.contextmanager
    def used(self) -> Iterator[Path]:
        """The directory, which stays at least until the block ends.

        Raises:
            ResourceExhausted: it cannot be made.
        """
        if self._path is None:
            try:
                with _room():
                    self._path = self._scratch.fresh()
            except BaseException:
                self._gone()
                raise
        self._users += 1
        try:
            yield self._path
        finally:
            self._users -= 1
            if not self._users:
                # large files take a while to go, and nobody has to wait for it
                deleting = asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, self._path, True)
                deleting.add_done_callback(lambda _: self._gone())


async def receive(data: AsyncIterator[bytes], files: Sequence[SpooledFile], folder: Path) -> None:
    """Writes what comes, the files' bytes laid end to end, into a directory, and checks lengths and hashes.

    Raises:
        InvalidArgument: there is more, or less, than the files' lengths say.
        DataLoss: a file is not what its hash says.
        ResourceExhausted: the disk is full.
    """
    with contextlib.closing(_Writer(files, folder)) as writer:
        async for piece in data:
            await elsewhere(lambda piece=piece: writer.write(piece))  # type: ignore[misc]
        writer.check_whole()


async def described(folder: Path) -> list[SpooledFile]:
    """The files of a directory, by name."""

    def describe() -> list[SpooledFile]:
        return [_describe(path) for path in sorted(folder.iterdir())]

    return await elsewhere(describe)


async def pieces(files: Sequence[SpooledFile], folder: Path) -> AsyncGenerator[bytes, None]:
    """The bytes of these files, laid end to end."""
    for one in files:
        with (folder / one.name).open("rb") as file:
            while piece := await elsewhere(lambda file=file: file.read(CHUNK)):  # type: ignore[misc]
                yield piece


class _Writer:
    """Takes the files' bytes in pieces of any length."""

    def __init__(self, files: Sequence[SpooledFile], folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._index = 0
        self._written = 0  # of the file under way
        self._out: BinaryIO | None = None
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with _room():
            while rest:
                if self._index == len(self._files):
                    raise InvalidArgument(
                        "TOO_MANY_BYTES",
                        f"data goes on after the {sum(one.bytes for one in self._files)} bytes that the header's files "
                        "have: send the bytes that it counts",
                        field="data",
                    )
                rest = rest[self._take(rest) :]

    def _take(self, data: memoryview) -> int:
        """Writes what belongs to the file under way; how many bytes that were."""
        now = self._files[self._index]
        if self._out is None:
            self._out = (self._folder / now.name).open("xb")
        part = data[: now.bytes - self._written]
        self._out.write(part)
        self._hash.update(part)
        self._written += len(part)
        if self._written == now.bytes:
            self._end_file(now)
        return len(part)

    def _end_file(self, now: SpooledFile) -> None:
        found = self._hash.hexdigest()
        if found != now.sha256:
            field = f"files[{self._index}].sha256"
            raise DataLoss(
                "HASH_MISMATCH",
                f"{field} of {now.name} is {now.sha256}, and what came has {found}: send it again",
                field=field,
            )
        self.close()
        self._index, self._written, self._hash = self._index + 1, 0, hashlib.sha256()

    def check_whole(self) -> None:
        if self._index < len(self._files):
            now = self._files[self._index]
            raise InvalidArgument(
                "TRUNCATED",
                f"data ended after {self._written} of the {now.bytes} bytes of {now.name}: send all of the files that "
                "the header names",
                field="data",
            )

    def close(self) -> None:
        """Closes the file under way."""
        if self._out is not None:
            self._out.close()
            self._out = None


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceExhausted(
            "NO_SPACE",
            f"the server cannot keep the files ({error.strerror}): its operator must make room",
            retry_after=5.0,
        ) from error


def _describe(path: Path) -> SpooledFile:
    with path.open("rb") as file:
        return SpooledFile(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@contextlib.contextmanager
def shown_as(folder: Path, name: str) -> Iterator[None]:
    """Errors of a directory of the server's own in the words of who meant it: by the name that they know it by."""
    try:
        yield
    except OnebaseError as error:
        message = error.message.replace(f"{folder}/", f"{name}/" if name else "").replace(
            str(folder), name or "the upload"
        )
        field = "files" if error.field == "path" and not name else error.field
        raise type(error)(error.reason, message, field=field, retry_after=error.retry_after) from error


async def elsewhere(function: Callable[[], R]) -> R:
    """Runs a short function on another thread; a cancel waits until it is done, so that nothing is written after it."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
