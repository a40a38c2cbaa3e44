"""A server that is killed in the middle of an upload leaves files; the next one sweeps them, and nobody else's."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from oracle.fixtures import FIXTURES
from server.test_files import FILES, described
from support import start_server

from onebase.v1 import adapters_pb2, adapters_pb2_grpc, types_pb2

pytestmark = pytest.mark.e2e


def begun(address: str, stop: threading.Event) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    files = [described(name, data) for name, data in FILES.items()]
    header = adapters_pb2.UploadAdapterHeader(name="up", kind=types_pb2.ADAPTER_KIND_POLICY, files=files)
    yield adapters_pb2.UploadAdapterRequest(header=header)
    yield adapters_pb2.UploadAdapterRequest(data=FILES["adapter_config.json"])
    stop.wait(60)


def test_what_a_killed_server_left_of_an_upload_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    shutil.copytree(FIXTURES / "base", tmp_path / "base")
    folder = tmp_path / "tmp" / f"onebase-{os.getuid()}"
    stop = threading.Event()
    with (
        start_server(tmp_path / "base", "--threads", "1") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter.future(begun(server.address, stop))
        until = time.monotonic() + 30
        while not list(folder.glob("*/*/adapter_config.json")):
            assert time.monotonic() < until
            time.sleep(0.05)
        server.process.kill()
        server.process.wait()
        stop.set()
        assert call.exception(timeout=30) is not None
    (left,) = folder.glob("*/*/adapter_config.json")
    with start_server(tmp_path / "base", "--threads", "1") as server:
        assert not left.exists()
        assert [one.name for one in folder.iterdir()] == ["lock"]
        assert "left by a server that was killed" in server.text()
