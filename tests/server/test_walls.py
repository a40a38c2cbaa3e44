"""Tenants under one root: what each may read and write, and what somebody tries who owns a directory there."""

from __future__ import annotations

import os
import sys
import threading

import grpc
import pytest
from server.harness import refused
from server.tenants import Guarded

from onebase.server.config import AdapterSource, ConfigError, EngineConfig, Limits, Security, ServerConfig
from onebase.server.errors import OnebaseError, PermissionDenied
from onebase.server.jobs import LoadAdapterJob
from onebase.server.paths import Roots
from onebase.server.tokens import TokenFile, TokenFileError
from onebase.v1 import adapters_pb2, types_pb2

POLICY = types_pb2.ADAPTER_KIND_POLICY
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PATH_OUTSIDE_ROOTS")
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


def adapter(folder, mark=b"weights"):
    folder.mkdir(parents=True)
    for name, data in {**FILES, "adapter_model.safetensors": mark}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def root(tmp_path):
    """A root in which red and blue have an adapter each, and the operator has one."""
    for name in ("red/mine", "blue/mine", "whole"):
        adapter(tmp_path / "root" / name, name.encode())
    return tmp_path / "root"


@pytest.fixture
def guarded(tmp_path, root):
    adapter(tmp_path / "shared/good", b"shared")
    with Guarded(
        tmp_path,
        roots=(root,),
        shared_roots=(tmp_path / "shared",),
        policies=(AdapterSource("p", None),),
        limits=Limits(max_upload_bytes=1000),
    ) as server:
        yield server


def load(client, path, name="x"):
    return client.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name, path=str(path), kind=POLICY))


def save(client, path, name="p", **more):
    return client.adapters.SaveAdapter(adapters_pb2.SaveAdapterRequest(name=name, path=str(path), **more))


def denied(method, client, path):
    refusal = refused(method, client, path)
    return (refusal.code, refusal.reason), refusal.message


def weights(guarded):
    return guarded.worker.read["adapter_model.safetensors"]


def test_each_tenant_has_a_directory_of_its_own_and_the_operator_all(guarded, root):
    red, blue, operator = (guarded.as_(name) for name in ("red", "blue", "operator"))
    for client, path, there in (
        (red, "mine", "red/mine"),
        (blue, "mine", "blue/mine"),
        (red, root / "red/mine", "red/mine"),
        (red, "x/../mine/.", "red/mine"),
        (operator, "red/mine", "red/mine"),
        (operator, "whole", "whole"),
    ):
        assert load(client, path, f"a{len(guarded.worker.executed)}").source == str(root / there)
        assert weights(guarded) == there.encode()
    saved = save(red, "deep/new")
    assert saved.path == str(root / "red/deep/new")
    assert (root / "red/deep/new/adapter_model.safetensors").read_bytes() == b"weights"
    assert save(operator, "blue/new").path == str(root / "blue/new")
    assert load(red, saved.path, "again").source == saved.path
    assert not list((root / ".onebase").glob("*/*"))


def test_a_directory_is_made_when_it_is_first_used_and_is_its_owners_alone(guarded, root):
    assert save(guarded.as_("green"), "a").path == str(root / "green/a")
    assert (root / "green").stat().st_mode & 0o777 == 0o700


HOSTILE = [
    "../blue/mine", "mine/../../blue/mine", "..", "../..", "/", "/etc", "../red-x", "../RED/mine", "../.onebase",
    "../whole", "~/../../blue/mine", "./../blue",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("method", [load, save])
def test_nothing_leads_to_others(guarded, path, method):
    assert denied(method, guarded.as_("red"), path)[0] == DENIED


@pytest.mark.parametrize("method", [load, save])
def test_what_others_have_is_told_no_more_than_what_nobody_has(guarded, root, method):
    red = guarded.as_("red")
    (root / "blue/circle").symlink_to("circle")
    for there in ("blue/mine", "blue", "whole", "blue/circle", "blue/circle/x"):
        for path in (root / there, f"../{there}"):
            absent = str(path).replace(there, "zzz/none")
            _, message = denied(method, red, path)
            assert message.replace(str(path), absent) == denied(method, red, absent)[1]
            assert str(root / "blue") not in message.replace(str(path), "")


@pytest.mark.parametrize("method", [load, save])
def test_no_symlink_is_followed(guarded, root, tmp_path, method):
    red = guarded.as_("red")
    (root / "red/blue").symlink_to(root / "blue")
    (root / "red/other").symlink_to(root / "blue/mine")
    (root / "red/none").symlink_to(root / "blue/none")
    (root / "red/out").symlink_to(tmp_path)
    messages = set()
    for path in ("other", "blue/mine", "none", "out", "out/tokens.json", "blue/none/x"):
        status, message = denied(method, red, path)
        assert status == DENIED, path
        messages.add(message.replace(repr(path), "PATH"))
    assert len(messages) == 1  # whether it leads anywhere is not told


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_that_is_a_link_is_not_read(guarded, root, link):
    adapter(root / "red/linked")
    (root / "red/linked/adapter_model.safetensors").unlink()
    link(root / "blue/mine/adapter_model.safetensors", root / "red/linked/adapter_model.safetensors")
    assert denied(load, guarded.as_("red"), "linked")[0] == DENIED
    assert not [one for one in guarded.worker.executed if isinstance(one, LoadAdapterJob)]


def test_a_pipe_makes_nobody_wait(guarded, root):
    adapter(root / "red/piped")
    (root / "red/piped/adapter_model.safetensors").unlink()
    os.mkfifo(root / "red/piped/adapter_model.safetensors")
    assert denied(load, guarded.as_("red"), "piped")[0] == DENIED


def test_what_is_loaded_is_a_copy_that_its_owner_cannot_change(guarded, root):
    red = guarded.as_("red")

    def swap(job):
        if isinstance(job, LoadAdapterJob):
            (root / "red/mine/adapter_model.safetensors").unlink()
            (root / "red/mine/adapter_model.safetensors").symlink_to(root / "blue/mine/adapter_model.safetensors")

    guarded.worker.before = swap
    load(red, "mine")
    assert weights(guarded) == b"red/mine"


def test_a_directory_that_is_swapped_while_it_is_written_leads_nowhere_else(guarded, root):
    red = guarded.as_("red")
    (root / "red/runs").mkdir()

    def swap(_job):
        (root / "red/runs").rename(root / "red/gone")
        (root / "red/runs").symlink_to(root / "blue")

    guarded.worker.before = swap
    refusal = refused(
        red.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name="p", path="runs/mine", overwrite=True)
    )
    assert (refusal.code, refusal.reason) == DENIED
    assert (root / "blue/mine/adapter_model.safetensors").read_bytes() == b"blue/mine"
    assert not list((root / ".onebase").glob("*/*"))


def test_swapping_all_the_time_never_gets_anything_of_anothers(root, tmp_path):
    """A race, many times over: the directory is red's own, then a symlink to blue's."""
    roots = Roots([root])
    stop = threading.Event()
    (root / "red/link").symlink_to(root / "blue/mine")

    def swap():
        while not stop.is_set():
            os.rename(root / "red/mine", root / "red/aside")
            os.rename(root / "red/link", root / "red/mine")
            os.rename(root / "red/mine", root / "red/link")
            os.rename(root / "red/aside", root / "red/mine")

    thread = threading.Thread(target=swap)
    thread.start()
    read, refused_ = 0, 0
    try:
        for number in range(2000):
            folder = tmp_path / "copies" / str(number)
            folder.mkdir(parents=True)
            try:
                roots.place("mine", "red").copy_to(folder, 1000)
            except OnebaseError:
                refused_ += 1
            else:
                read += 1
                assert (folder / "adapter_model.safetensors").read_bytes() == b"red/mine"
    finally:
        stop.set()
        thread.join()
    assert read
    assert refused_


def test_a_save_overwrites_adapters_alone_and_only_when_told(guarded, root):
    red = guarded.as_("red")
    assert refused(save, red, "mine").reason == "PATH_TAKEN"
    (root / "red/thesis").mkdir()
    (root / "red/thesis/years.txt").write_text("of work")
    assert refused(save, red, "thesis", overwrite=True).reason == "NOT_AN_ADAPTER"
    save(red, "mine", overwrite=True)
    assert (root / "red/mine/adapter_model.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in (root / "red").iterdir()) == ["mine", "thesis"]


@pytest.mark.parametrize("way", ["exchanged", "in two renames"])
def test_what_a_save_overwrites_is_there_until_the_new_one_is(root, tmp_path, monkeypatch, way):
    """Looked at between any two calls that it makes: a kill can come at each."""
    if way != "exchanged":
        monkeypatch.setattr("onebase.server.directories._renameat2", None)
    place, seen = Roots([root]).own("mine", "red"), []
    made = adapter(tmp_path / "made", b"new")

    def look(*_):
        try:
            seen.append((root / "red/mine/adapter_model.safetensors").read_bytes())
        except FileNotFoundError:
            seen.append(b"nothing")

    sys.setprofile(look)
    try:
        place.take(made, overwrite=True)
    finally:
        sys.setprofile(None)
    between = [] if way == "exchanged" else [b"nothing"]
    assert list(dict.fromkeys(seen)) == [b"red/mine", *between, b"new"]
    assert [path.name for path in (root / "red").iterdir()] == ["mine"]
    assert not made.exists()


def test_the_directory_itself_is_not_written(guarded):
    for path in (".", "mine/.."):
        assert denied(save, guarded.as_("red"), path)[0] == DENIED


def test_what_is_shared_is_everybodys_to_load_and_nobodys_to_save_to(guarded, tmp_path):
    red, shared = guarded.as_("red"), tmp_path / "shared"
    assert load(red, shared / "good").source == str(shared / "good")
    assert weights(guarded) == b"shared"
    assert load(guarded.as_("operator"), shared / "good").name == "x"
    for client in (red, guarded.as_("operator")):
        assert denied(save, client, shared / "new")[0] == DENIED
    (shared / "out").symlink_to(tmp_path / "root/blue")
    for path in (shared / "../root/blue/mine", shared / "out/mine", shared / "good/../../tokens.json"):
        assert denied(load, red, path)[0] == DENIED


def test_a_directory_holds_no_more_than_an_upload_may(guarded, root):
    (root / "red/mine/optimizer.safetensors").write_bytes(b"x" * 1001)
    refusal = refused(load, guarded.as_("red"), "mine")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")


def test_errors_name_the_path_as_its_client_did(guarded, tmp_path):
    guarded.worker.failures.append(PermissionDenied("WHY", "placeholder"))

    def fail(job):
        guarded.worker.failures[:] = [PermissionDenied("WHY", f"{job.path}/a is wrong, and so is {job.path}")]

    guarded.worker.before = fail
    assert refused(load, guarded.as_("red"), "mine").message == "mine/a is wrong, and so is mine"


def test_where_the_operators_adapters_lie_is_not_told(guarded, root):
    load(guarded.as_("operator"), root / "whole", "known")
    get = adapters_pb2.GetAdapterRequest(name="known")
    assert guarded.as_("operator").adapters.GetAdapter(get).source == str(root / "whole")
    assert guarded.as_("red").adapters.GetAdapter(get).source == ""


@pytest.mark.parametrize(
    ("roots", "shared"),
    [(("a", "a/b"), ()), (("a/b", "a"), ()), (("a",), ("a/b",)), (("a/b",), ("a",)), (("a",), ("a",))],
)
def test_no_root_holds_another(tmp_path, roots, shared):
    (tmp_path / "a/b").mkdir(parents=True)
    TokenFile(tmp_path / "tokens.json").add("red", (), (), None)
    given = {"roots": tuple(tmp_path / one for one in roots), "shared_roots": tuple(tmp_path / one for one in shared)}
    ServerConfig(engine=EngineConfig(model="fake"), **given)
    with pytest.raises(ConfigError, match="no root may hold another"):
        ServerConfig(engine=EngineConfig(model="fake"), security=Security(tokens=tmp_path / "tokens.json"), **given)


def test_tenants_differ_in_more_than_capitals(tmp_path):
    file = TokenFile(tmp_path / "tokens.json")
    file.add("Red", (), (), None)
    file.add("Red", (), (), None)
    for name in ("red", "RED", "Operator"):
        with pytest.raises(TokenFileError, match="differs"):
            file.add(name, (), (), None)


def test_what_a_call_has_saved_is_known_by_its_stamp_and_nothing_else_there_is_believed(root, tmp_path):
    place = Roots((root,), ()).own("mine", "red")
    manifest = root / "red/mine/onebase.json"
    for wrong in ("[]", "{", '{"stamp": "mine"}', '{"stamp": "mine", "version": "7"}', '{"stamp": "", "version": 7}'):
        manifest.write_text(wrong)
        assert place.saved("mine") is None
    manifest.write_text('{"stamp": "mine", "version": 7}')
    assert place.saved("mine") == (7, sum(file.stat().st_size for file in (root / "red/mine").iterdir()))
    assert place.saved("another's") is None
    (tmp_path / "elsewhere").write_text(manifest.read_text())
    manifest.unlink()
    manifest.symlink_to(tmp_path / "elsewhere")
    assert place.saved("mine") is None
