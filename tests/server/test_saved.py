"""What tenants may save, in bytes: of each tenant, and of all of them together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from server.harness import refused
from server.tenants import Guarded

from onebase.server.config import AdapterSource, Quota
from onebase.server.walls import Place
from onebase.v1 import adapters_pb2

FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_SAVED_BYTES", "path")
ONE = len(b"{}") + len(b"weights")
"""Bytes of what the fake worker saves."""


@pytest.fixture
def serve(tmp_path):
    def start(**quotas):
        return Guarded(tmp_path, roots=(tmp_path / "root",), policies=(AdapterSource("p", None),), **quotas)

    (tmp_path / "root").mkdir()
    return start


def save(client, path, **more):
    return client.adapters.SaveAdapter(adapters_pb2.SaveAdapterRequest(name="p", path=str(path), **more))


def refusal(client, path, **more):
    found = refused(save, client, path, **more)
    return found.code, found.reason, found.field


def test_a_tenant_saves_so_many_bytes_and_others_as_many(serve, tmp_path):
    with serve(tenant_quota=Quota(saved_bytes=2 * ONE + 1)) as guarded:
        red, blue = guarded.as_("red"), guarded.as_("blue")
        save(red, "a")
        save(red, "deep/.b")  # a dot hides nothing
        assert refusal(red, "c") == FULL
        assert refusal(red, "deep/c") == FULL
        assert not (tmp_path / "root/red/c").exists()
        assert not list((tmp_path / "root/.onebase").glob("*/*"))
        save(red, "a", overwrite=True)  # takes the room of what it replaces
        save(blue, "a")
        for number in range(4):
            save(guarded.as_("operator"), f"mine{number}")


def test_what_a_tenant_has_put_there_itself_counts_too(serve, tmp_path):
    (tmp_path / "root/red/stuff").mkdir(parents=True)
    (tmp_path / "root/red/stuff/data").write_bytes(bytes(90))
    with serve(tenant_quota=Quota(saved_bytes=90 + ONE - 1)) as guarded:
        assert refusal(guarded.as_("red"), "a") == FULL
        (tmp_path / "root/red/stuff/data").unlink()
        save(guarded.as_("red"), "a")


def test_no_link_makes_room(serve, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big/data").write_bytes(bytes(1000))
    (tmp_path / "root/red").mkdir(parents=True)
    (tmp_path / "root/red/link").symlink_to(tmp_path / "big")
    with serve(tenant_quota=Quota(saved_bytes=ONE)) as guarded:
        save(guarded.as_("red"), "a")  # what a link leads to does not count
        assert refusal(guarded.as_("red"), "b") == FULL
        assert refused(save, guarded.as_("red"), "link", overwrite=True).reason == "PATH_OUTSIDE_ROOTS"


def test_all_tenants_together_save_so_many_bytes(serve, tmp_path):
    (tmp_path / "root/file").write_bytes(b"")  # the operator's, as is the link
    (tmp_path / "root/link").symlink_to(tmp_path)
    with serve(quota=Quota(saved_bytes=2 * ONE)) as guarded:
        save(guarded.as_("red"), "a")
        save(guarded.as_("blue"), "a")
        assert refusal(guarded.as_("green"), "a") == FULL
        assert "all tenants together" in refused(save, guarded.as_("green"), "a").message


def test_two_saves_at_once_do_not_both_take_the_last_room(serve, monkeypatch):
    both, take = threading.Barrier(2), Place.take
    with serve(tenant_quota=Quota(saved_bytes=ONE)) as guarded, ThreadPoolExecutor() as pool:
        red = guarded.as_("red")

        def slowly(place, made, *, overwrite):
            with pytest.raises(threading.BrokenBarrierError):
                both.wait(0.3)  # the other one does not come here meanwhile
            take(place, made, overwrite=overwrite)

        monkeypatch.setattr(Place, "take", slowly)
        calls = [pool.submit(save, red, path) for path in ("a", "b")]
        errors = [call.exception(20) for call in calls]
    assert sorted(error is None for error in errors) == [False, True]
