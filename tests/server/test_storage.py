"""What every storage keeps to, whichever kind it is; and what a bucket's failures become."""

from __future__ import annotations

import errno
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from bucket import BucketServer, register
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from onebase.server import failpoints
from onebase.server.config import ConfigError
from onebase.server.errors import DataLoss, ResourceExhausted, Unavailable
from onebase.server.storage import ABOUT, Bucket, Disk

FILES = st.dictionaries(st.sampled_from(["a.bin", "b.safetensors", "c.json"]), st.binary(max_size=64), min_size=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, BucketServer() as server:
        register(tmp_path_factory.mktemp("driver"), server, patch)
        yield server


@pytest.fixture
def bucket(store, tmp_path):
    store.status, store.only = 200, ()
    yield Bucket(f"bucket://b/{uuid.uuid4().hex}", tmp_path / "spool")
    store.status = 200


def fresh(uid=1):
    return f"{uid:06d}-{uuid.uuid4().hex[:12]}"


def write(storage, name, files):
    storage.place(name).mkdir()
    for file, data in files.items():
        (storage.place(name) / file).write_bytes(data)


def read(storage, name):
    with storage.opened(name) as path:
        return {one.name: one.read_bytes() for one in path.iterdir() if one.name != ABOUT}


class StorageMachine(RuleBasedStateMachine):
    """A dictionary of folders beside a storage that is opened anew at any moment."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.whole: dict[str, dict[str, bytes]] = {}
        self.half: set[str] = set()

    @initialize(kind=st.sampled_from(["disk", "file", "bucket"]))
    def begin(self, kind):
        self.kind = kind
        self.url = {"file": f"file://{self.folder}/there", "bucket": f"bucket://b/{uuid.uuid4().hex}"}.get(kind, "")
        self.reopen()

    @rule()
    def reopen(self):
        """As after a crash: a spool loses what was on its way."""
        self.storage = Bucket(self.url, self.folder / "spool") if self.url else Disk(self.folder / "here")

    @rule(files=FILES)
    def put(self, files):
        name = fresh()
        write(self.storage, name, files)
        self.storage.put(name, {"files": sorted(files)})
        self.whole[name] = files
        if self.url:
            assert self.storage.about(name) == {"files": sorted(files)}
            assert not self.storage.place(name).exists()

    @rule(files=FILES)
    def put_half(self, files):
        name = fresh()
        write(self.storage, name, files)
        self.half.add(name)
        if self.url:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(failpoints.VARIABLE, f"during_put:full@{failpoints._hits['during_put'] + 1}")
                with pytest.raises(ResourceExhausted):
                    self.storage.put(name, {})
            assert self.storage.about(name) is None

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.whole)))
        self.storage.remove(name)
        self.storage.remove(name)  # of what is gone
        del self.whole[name]

    @rule()
    def sweep(self):
        for name in set(self.storage.names()) - set(self.whole):
            self.storage.remove(name)
        self.half.clear()
        assert set(self.storage.names()) == set(self.whole)

    @invariant()
    def agree(self):
        if not hasattr(self, "storage"):
            return
        assert set(self.whole) <= set(self.storage.names()) <= set(self.whole) | self.half
        for name, files in self.whole.items():
            assert read(self.storage, name) == files
        if self.url:
            assert not list((self.folder / "spool").glob("*.*"))  # no copy stays

    def teardown(self):
        shutil.rmtree(self.folder)


StorageMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)


@pytest.mark.usefixtures("store")
class TestStorage(StorageMachine.TestCase):
    """With the object store running."""


def test_somebody_elses_things_are_left_alone(bucket, store):
    root = bucket.url.removeprefix("bucket://")
    for key in ("notes.txt", "datasets/rows.jsonl", "owner.json"):
        store.objects[f"{root}/{key}"] = b"{}"
    assert bucket.names() == []


def test_what_lies_beside_a_folder_comes_last(bucket, store):
    name = fresh()
    write(bucket, name, {"z": b"1", "a": b"2"})
    bucket.put(name, {"x": 1})
    assert [key.rpartition("/")[2] for method, key in store.asked if method == "PUT"][-3:] == ["a", "z", ABOUT]


@pytest.mark.parametrize(("status", "reason"), [(503, "STORE_AWAY"), (403, "STORE_DENIED")])
def test_a_store_that_fails_is_unavailable_for_a_while_and_named(bucket, store, status, reason):
    name = fresh()
    write(bucket, name, {"a": b"1"})
    store.status = status
    for call in (lambda: bucket.put(name, {}), bucket.names, bucket.owner, lambda: bucket.claim({})):
        with pytest.raises(Unavailable) as caught:
            call()
        assert (caught.value.reason, bucket.url in caught.value.message) == (reason, True)
        assert caught.value.retry_after
    with pytest.raises(Unavailable), bucket.opened(name):
        pass
    bucket.remove(name)  # is put off
    store.status = 200
    write(bucket, name, {"a": b"1"})
    bucket.put(name, {})
    assert read(bucket, name) == {"a": b"1"}


def test_what_is_gone_is_data_loss_and_a_full_disk_is_one(bucket, monkeypatch):
    with pytest.raises(DataLoss) as caught, bucket.opened(fresh()):
        pass
    assert caught.value.reason == "CHECKPOINT_DAMAGED"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(bucket._fs, "pipe_file", full)
    with pytest.raises(ResourceExhausted) as caught:
        bucket.claim({})
    assert caught.value.reason == "DISK_FULL"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://x", "outlives nothing"),
        ("s3://bucket/prefix", "pip install s3fs"),
        ("gs://bucket", "pip install gcsfs"),
        ("nothing://x", "nothing"),
        ("/a/directory", "give one URL"),
        ("simplecache::s3://bucket", "give one URL"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_the_way_out(tmp_path, monkeypatch, url, told):
    for driver in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, driver, None)  # is not installed
    with pytest.raises(ConfigError, match=told):
        Bucket(url, tmp_path / "spool")


def test_no_secret_of_a_url_is_told(tmp_path):
    with pytest.raises(ConfigError) as caught:
        Bucket("nothing://user:secret@host/prefix?key=secret", tmp_path / "spool")
    assert "nothing://host/prefix" in str(caught.value)
    assert "secret" not in str(caught.value)
