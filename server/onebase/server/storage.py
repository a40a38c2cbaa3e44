"""Where checkpoints lie: on this machine's disk, or at any URL that fsspec knows, such as a bucket.

Either kind holds folders of plain files. A folder is written once, under a name that nobody has had, and it counts only
when the registry names it: so a bucket needs no rename, and what was put there half is a leftover like any other.

Knows nothing of what the files are. Everything here may wait for a disk or for a network, and any thread may use it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from onebase.server import failpoints
from onebase.server.config import ConfigError
from onebase.server.errors import DataLoss, OnebaseError, Unavailable, disk_full

log = logging.getLogger(__name__)

ABOUT = "registry.json"
"""What the registry knows of a folder, beside its files at a URL: written last, so it is there if all of them are."""

_OWNER = "owner.json"
_OURS = re.compile(r"\d{6,}-[0-9a-f]{12}", re.ASCII)
"""Names of folders; whatever else lies at a URL is somebody else's."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORGETFUL = ("memory", "data")


class Storage(Protocol):
    """Folders of plain files by name."""

    url: str
    """Where, for people; "" for the state directory itself."""

    def place(self, name: str) -> Path:
        """Where on this machine's disk a folder shall be written, before `put`."""
        ...

    def put(self, name: str, about: Mapping[str, Any]) -> None:
        """Makes a folder durable that was written, and synced, at its place; that place may be empty then.

        Args:
            name: the folder's.
            about: what the registry will know of it, for a storage that may outlive the registry.

        Raises:
            OnebaseError: Unavailable (STORE_AWAY, STORE_DENIED) or ResourceExhausted (DISK_FULL); it may be there half.
        """
        ...

    def opened(self, name: str) -> AbstractContextManager[Path]:
        """A folder on this machine's disk for as long as the block runs.

        Raises:
            OnebaseError: Unavailable, or DataLoss (CHECKPOINT_DAMAGED) where it is gone.
        """
        ...

    def names(self) -> list[str]:
        """All folders, also those that were written half.

        Raises:
            OnebaseError: Unavailable.
        """
        ...

    def remove(self, name: str) -> None:
        """Deletes a folder. One that cannot be deleted now is a leftover: it is logged."""
        ...


class Disk:
    """Folders below a directory of this machine, which lies beside the registry."""

    url = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def place(self, name: str) -> Path:
        """Its final place: who writes a folder renames it there when it is whole."""
        return self._folder / name

    def put(self, name: str, about: Mapping[str, Any]) -> None:
        """Nothing is left to do."""

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """The folder itself."""
        yield self._folder / name

    def names(self) -> list[str]:
        """All that lies there."""
        return sorted(one.name for one in self._folder.iterdir())

    def remove(self, name: str) -> None:
        """Deletes it, as far as the disk lets it."""
        shutil.rmtree(self._folder / name, ignore_errors=True)


class Bucket:
    """Folders at a URL, by way of a spool on this machine's disk.

    Args:
        url: any that fsspec knows and can write to; the drivers take their settings from the environment.
        spool: a directory of this process's own; what lies there is deleted.

    Raises:
        ConfigError: it is no such URL, or its driver is not installed.
    """

    def __init__(self, url: str, spool: Path) -> None:
        self.url = _shown(url)
        self._fs, root = _file_system(url, self.url)
        self._root = root.rstrip("/")
        self._spool = spool
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(mode=0o700)
        if isinstance(self._fs, LocalFileSystem):  # elsewhere a bucket that is not there is rather misspelled
            self._fs.makedirs(self._root, exist_ok=True)

    def place(self, name: str) -> Path:
        """A place in the spool."""
        return self._spool / name

    def put(self, name: str, about: Mapping[str, Any]) -> None:
        """Copies it there, what is known about it last, and empties its place."""
        place, folder = self._spool / name, f"{self._root}/{name}"
        with self._told("written"):
            self._fs.makedirs(folder, exist_ok=True)
            for file in sorted(place.iterdir()):
                self._fs.put_file(str(file), f"{folder}/{file.name}")
                failpoints.hit("during_put")
            self._write(f"{folder}/{ABOUT}", about)
            self._sync(name)
        failpoints.hit("after_put")
        shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A copy in the spool, which goes with the block."""
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=self._spool) as folder:
            with self._told("read"):
                try:
                    for leaf in self._ls(name):
                        self._fs.get_file(f"{self._root}/{name}/{leaf}", f"{folder}/{leaf}")
                except FileNotFoundError as error:
                    raise DataLoss("CHECKPOINT_DAMAGED", f"{self.url}/{name} is gone, or a file of it") from error
            yield Path(folder)

    def names(self) -> list[str]:
        """The folders whose names are ours."""
        with self._told("listed"):
            try:
                return sorted(leaf for leaf in self._ls("") if _OURS.fullmatch(leaf))
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        """Deletes it there, and from the spool."""
        shutil.rmtree(self._spool / name, ignore_errors=True)
        try:
            self._fs.rm(f"{self._root}/{name}", recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            log.warning("%s/%s cannot be deleted, and is swept at the next start: %s", self.url, name, error)

    def about(self, name: str) -> dict[str, Any] | None:
        """What `put` was told about a folder; None where it was never there whole, or cannot be understood.

        Raises:
            OnebaseError: Unavailable.
        """
        return self._read(f"{self._root}/{name}/{ABOUT}")

    def owner(self) -> dict[str, Any] | None:
        """What the state that this URL belongs to has said of itself; None where there is none.

        Raises:
            OnebaseError: Unavailable.
        """
        return self._read(f"{self._root}/{_OWNER}")

    def claim(self, owner: Mapping[str, Any]) -> None:
        """Says whose this URL is from now on.

        Raises:
            OnebaseError: Unavailable; ResourceExhausted.
        """
        with self._told("written"):
            self._write(f"{self._root}/{_OWNER}", owner)
            self._sync("")

    def _ls(self, name: str) -> list[str]:
        """The names of what lies in a folder; raises FileNotFoundError where there is none."""
        self._fs.invalidate_cache()
        found = self._fs.ls(f"{self._root}/{name}".rstrip("/"), detail=False)
        leaves = (one.rstrip("/").rpartition("/")[2] for one in found)
        return sorted(leaf for leaf in leaves if leaf and leaf == Path(leaf).name)

    def _read(self, path: str) -> dict[str, Any] | None:
        with self._told("read"):
            try:
                found = json.loads(self._fs.cat_file(path))
            except (FileNotFoundError, ValueError):
                return None
        return found if isinstance(found, dict) else None

    def _write(self, path: str, what: Mapping[str, Any]) -> None:
        self._fs.pipe_file(path, json.dumps(what, indent=2).encode() + b"\n")

    def _sync(self, name: str) -> None:
        """What a bucket has taken is durable; what a disk has taken is not."""
        if isinstance(self._fs, LocalFileSystem):
            folder = Path(self._root, name)
            for one in (*folder.iterdir(), folder, Path(self._root)):
                descriptor = os.open(one, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Whatever a driver raises, in our words; each has errors of its own, of many classes."""
        try:
            yield
        except (OnebaseError, FileNotFoundError):
            raise
        except PermissionError as error:
            log.warning("%s cannot be %s: %s", self.url, doing, error)
            raise Unavailable(
                "STORE_DENIED",
                f"the checkpoints at {self.url} cannot be {doing}, access is denied: see to the server's credentials "
                "and to what they allow there; nothing that was durable is lost, and the call may be repeated then",
                retry_after=15.0,
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise disk_full(error) from error
            log.warning("%s cannot be %s: %s: %s", self.url, doing, type(error).__name__, error)
            raise Unavailable(
                "STORE_AWAY",
                f"the checkpoints at {self.url} cannot be {doing} just now ({type(error).__name__}): the server's log "
                "has the story; nothing that was durable is lost, and the call may be repeated",
                retry_after=5.0,
            ) from error


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it."""
    protocol = urlsplit(url).scheme
    if "::" in url or not protocol or "://" not in url:
        raise ConfigError(f"checkpoints is {shown!r}: give one URL, as s3://bucket/prefix or file:///directory")
    if protocol in _FORGETFUL:
        raise ConfigError(f"checkpoints is {shown!r}: what lies in memory outlives nothing; give a bucket or a disk")
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"checkpoints is {shown!r}: {_driver(protocol, error)}") from error
    except Exception as error:
        raise ConfigError(f"checkpoints is {shown!r}: it cannot be used: {error}") from error
    return system, root


def _driver(protocol: str, error: ImportError) -> str:
    """How the driver of a protocol is had."""
    package = str(known_implementations.get(protocol, {}).get("class", "fsspec")).partition(".")[0]
    if package == "fsspec":
        return f"its driver cannot be loaded: {error}"
    return f"its driver is not installed: pip install {package}"


def _shown(url: str) -> str:
    """A URL without what may be secret in it."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}".rstrip("/")
