"""SaveAdapter happens once, also where the server is killed after the directory is in its place."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from restarts.conftest import Start
from restarts.plain import Code, Plain, refused

from onebase.v1 import adapters_pb2


def killed_before_the_answer(start: Start, state: Path, request: adapters_pb2.SaveAdapterRequest, there: Path) -> None:
    """Sends it to a server whose registry is held by somebody else, and kills that when the directory is there."""
    with start() as server, Plain(server.address) as client:
        client.open()
        client.create()
        client.train()
        with closing(sqlite3.connect(state / "registry.sqlite", isolation_level=None)) as registry:
            registry.execute("BEGIN IMMEDIATE")
            call = client.adapters.SaveAdapter.future(request)
            until = time.monotonic() + 20
            while not (there / "onebase.json").exists() and time.monotonic() < until:
                time.sleep(0.01)
            assert not call.done()
            server.process.kill()
            server.process.wait()
            assert refused(call.result) == (Code.UNAVAILABLE, "")
            registry.execute("ROLLBACK")


@pytest.mark.fault(3, times=2)
def test_a_save_whose_answer_was_lost_is_answered_by_what_is_there(start: Start, state: Path, tmp_path: Path) -> None:
    """Fault 3, for SaveAdapter, whose effect is outside of the state."""
    root = tmp_path / "root"
    request = adapters_pb2.SaveAdapterRequest(request_id="once", name="p", path="there")
    begin = lambda: start("--root", str(root), "--checkpoint-steps", "1")  # noqa: E731
    killed_before_the_answer(begin, state, request, root / "there")
    written = {file.name: file.stat().st_mtime_ns for file in (root / "there").iterdir()}
    with begin() as server, Plain(server.address) as client:
        answer = client.adapters.SaveAdapter(request)
        assert answer.path == str(root / "there")
        assert answer.adapter.version == 1
        assert answer.bytes == sum(file.stat().st_size for file in (root / "there").iterdir())
        assert {file.name: file.stat().st_mtime_ns for file in (root / "there").iterdir()} == written
        assert client.adapters.SaveAdapter(request) == answer
        for other in (
            adapters_pb2.SaveAdapterRequest(request_id="another", name="p", path="there"),
            adapters_pb2.SaveAdapterRequest(name="p", path="there"),
        ):
            assert refused(client.adapters.SaveAdapter, other) == (Code.ALREADY_EXISTS, "PATH_TAKEN")
