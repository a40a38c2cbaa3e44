"""Adapters' files on their way: no tenant fills the scratch disk, or has any number of uploads open."""

from __future__ import annotations

import queue

import grpc
import pytest
from server.harness import eventually, refusal_of, refused
from server.tenants import Guarded
from server.test_files import TOTAL, header, upload

from onebase.server.config import Limits
from onebase.server.errors import ResourceExhausted
from onebase.server.identity import OPERATOR, Caller, set_caller
from onebase.server.transfers import Transfers
from onebase.v1 import adapters_pb2, types_pb2

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def guarded(tmp_path):
    (tmp_path / "roots").mkdir()
    limits = Limits(max_upload_bytes=3 * TOTAL, max_transfers_per_tenant=2)
    with Guarded(tmp_path, limits=limits, roots=(tmp_path / "roots",)) as server:
        yield server


class Slow:
    """An upload that has sent its header, and waits; ended by `finish`."""

    def __init__(self, client, name, files=None):
        self._more = queue.Queue()
        self.outcome = client.adapters.UploadAdapter.future(self._parts(header(name, files=files)))

    def _parts(self, head):
        first, *rest = upload(head)
        yield first
        if self._more.get():
            yield from rest

    def finish(self, whole=True):
        self._more.put(whole)
        try:
            return self.outcome.result(20)
        except grpc.RpcError as error:
            return refusal_of(error)


def under_way(guarded, count):
    eventually(lambda: guarded.on_loop(guarded.edge.disks.transfers._open.total) == count)


def big(size):
    return [
        adapters_pb2.AdapterFile(name=name, bytes=size, sha256="0" * 64)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]


def test_a_tenant_has_few_uploads_open_and_others_are_let_in(guarded):
    red, blue = guarded.as_("red"), guarded.as_("blue")
    slow = [Slow(red, f"p{number}") for number in range(2)]
    under_way(guarded, 2)
    refusal = refused(red.adapters.UploadAdapter, upload(header("p3")))
    assert (refusal.code, refusal.reason) == (FULL, "QUOTA_TRANSFERS")
    assert refusal.retry_after
    assert blue.adapters.UploadAdapter(upload(header("p3"))).name == "p3"
    assert [one.finish().name for one in slow] == ["p0", "p1"]
    under_way(guarded, 0)
    assert red.adapters.UploadAdapter(upload(header("p3"))).name == "p3"


def test_what_uploads_declare_is_reserved_before_it_comes(guarded):
    red, blue = guarded.as_("red"), guarded.as_("blue")
    slow = Slow(red, "p", big(TOTAL))
    under_way(guarded, 1)
    refusal = refused(red.adapters.UploadAdapter, upload(header("q", files=big(TOTAL))))
    assert (refusal.code, refusal.reason) == (FULL, "SCRATCH_FULL")
    assert refusal.retry_after
    assert blue.adapters.UploadAdapter(upload(header("q"))).name == "q"
    assert slow.finish(whole=False).reason == "TRUNCATED"
    under_way(guarded, 0)
    assert red.adapters.UploadAdapter(upload(header("q"))).name == "q"


def test_loads_of_a_tenants_own_directory_and_downloads_count_too(guarded, tmp_path):
    red = guarded.as_("red")
    folder = tmp_path / "roots" / "red" / "one"
    folder.mkdir(parents=True)
    for name, data in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weights")):
        (folder / name).write_bytes(data)
    load = adapters_pb2.LoadAdapterRequest(name="one", path="one", kind=types_pb2.ADAPTER_KIND_POLICY)
    assert red.adapters.LoadAdapter(load).name == "one"
    slow = [Slow(red, f"p{number}") for number in range(2)]
    under_way(guarded, 2)
    assert refused(red.adapters.LoadAdapter, load).reason == "QUOTA_TRANSFERS"
    download = adapters_pb2.DownloadAdapterRequest(name="one")
    assert refused(red.adapters.DownloadAdapter, download).reason == "QUOTA_TRANSFERS"
    for one in slow:
        one.finish()
    under_way(guarded, 0)
    assert list(red.adapters.DownloadAdapter(download))
    under_way(guarded, 0)


def test_a_cancelled_upload_gives_its_room_back(guarded):
    slow = Slow(guarded.as_("red"), "p")
    under_way(guarded, 1)
    slow.outcome.cancel()
    under_way(guarded, 0)
    slow._more.put(False)  # the thread that sends


def test_all_tenants_together_have_a_limit_and_nothing_is_kept_of_who_left():
    def as_(tenant, wanted):
        set_caller(Caller(tenant))
        return transfers.take(wanted)

    transfers = Transfers(whole=100, share=40, most=3)
    try:
        held = [as_("red", 40), as_("blue", 1000)]  # more than a share is all of it
        with pytest.raises(ResourceExhausted, match="all of them may take 100"):
            as_("green", 21)
        held.append(as_("green", 20))
        for give_back in (*held, *held):  # twice is once
            give_back()
        assert not transfers._bytes
        assert not transfers._open
    finally:
        set_caller(Caller(OPERATOR))
