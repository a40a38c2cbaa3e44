"""Paths and files that lead elsewhere, and pickles."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from faults.conftest import Place, fresh
from faults.uploads import POLICY, policy, upload
from safetensors.torch import load_file
from server.harness import refused

from onebase.v1 import adapters_pb2

pytestmark = pytest.mark.e2e

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@contextmanager
def untouched(place: Place) -> Iterator[None]:
    """Sees to it that no file around the roots, and none in them, is made, changed or gone after the block."""
    before = surroundings(place.root.parent)
    yield
    assert surroundings(place.root.parent) == before


def surroundings(folder: Path) -> dict[str, str]:
    """Every path in a directory: a hash of what it holds, or where it leads."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            what = f"link {os.readlink(path)}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        found[str(path.relative_to(folder))] = what
    return found


def own(place: Place) -> Path:
    """The directory under the root that is the tenant red's."""
    path = place.root / "red"
    path.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize(
    "path", ["../tokens.json", "/etc", "link", "link/x", "policy/../../x", "\0", "a\0b", "x" * 5000]
)
def test_21_a_path_that_leads_outside_is_refused(place: Place, path: str) -> None:
    for folder in (place.root, own(place)):
        if not (folder / "link").is_symlink():
            (folder / "link").symlink_to(place.root.parent)
    red, etc = place.as_("red"), sorted(os.listdir("/etc"))
    with untouched(place):
        for method, request in (
            (red.adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name="x", path=path, kind=POLICY)),
            (red.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name="p", path=path)),
            (red.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name="p", path=path, overwrite=True)),
        ):
            assert refused(method, request).code in (INVALID, grpc.StatusCode.PERMISSION_DENIED)
    assert sorted(os.listdir("/etc")) == etc


def test_21_a_symlink_in_a_directory_is_not_followed_out_of_it(place: Place) -> None:
    name = fresh("linked")
    folder = Path(shutil.copytree(place.root / "policy", own(place) / name))
    outside = place.root.parent / f"{name}.safetensors"
    shutil.move(folder / "adapter_model.safetensors", outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)
    request = adapters_pb2.LoadAdapterRequest(name=name, path=name, kind=POLICY)
    red = place.as_("red")
    with untouched(place):
        refusal = refused(red.adapters.LoadAdapter, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PATH_OUTSIDE_ROOTS")


@pytest.mark.parametrize("escape", ["../{}", "/tmp/{}", "a/../../{}", "{}\0", "./{}", "..", "a/{}", "\\{}"])
def test_21_a_file_of_an_upload_whose_name_leads_elsewhere_is_refused(place: Place, escape: str) -> None:
    red = place.as_("red")
    with untouched(place):
        for name, data in policy(place).items():
            files = {**policy(place), escape.format(name): data}
            refusal = refused(red.adapters.UploadAdapter, upload("x", files))
            assert (refusal.code, refusal.field) == (INVALID, "files[2].name")
            del files[name]
            assert refused(red.adapters.UploadAdapter, upload("x", files)).code is INVALID
            assert not Path("/tmp", name).exists()


def test_21_a_link_that_is_sent_is_a_file_of_that_text(place: Place) -> None:
    """Names and bytes are all that an upload has: no archive, so no links in it."""
    fields = adapters_pb2.AdapterFile.DESCRIPTOR.fields_by_name
    assert set(fields) == {"name", "bytes", "sha256"}
    files = {
        **policy(place),
        "adapter_model.safetensors": str(place.root / "policy/adapter_model.safetensors").encode(),
    }
    assert refused(place.as_("red").adapters.UploadAdapter, upload("x", files)).code is INVALID


class Bang:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


def test_22_a_pickle_is_refused_and_never_opened(place: Place) -> None:
    name = fresh("pickled")
    folder = Path(shutil.copytree(place.root / "policy", own(place) / name))
    (folder / "adapter_model.safetensors").unlink()
    tensors = load_file(place.root / "policy" / "adapter_model.safetensors")
    red, file = place.as_("red"), folder / "adapter_model.bin"
    # One that runs code wherever it is opened, and one that anybody could open without harm, and would have read.
    for write in (
        lambda: file.write_bytes(pickle.dumps(Bang(place.root / "opened"))),
        lambda: torch.save(tensors, file),
    ):
        write()
        os.utime(file, (0, 2**30))  # it was never read, and so the next who reads it is written down
        refusal = refused(red.adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name=name, path=name, kind=POLICY))
        assert (refusal.code, refusal.reason) == (INVALID, "PICKLE_ADAPTER")
        assert file.stat().st_atime == 0
        config = (folder / "adapter_config.json").read_bytes()
        files = {"adapter_config.json": config, "adapter_model.bin": file.read_bytes()}
        refusal = refused(red.adapters.UploadAdapter, upload(name, files))
        assert (refusal.code, refusal.reason, refusal.field) == (INVALID, "PICKLE_ADAPTER", "files[1].name")
    assert not (place.root / "opened").exists()
    assert all(one.name != f"red/{name}" for one in place.status().adapters)
