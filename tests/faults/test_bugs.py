"""A bug in a handler, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from server.harness import Refusal, pair, refusal_of, tokens_of
from support import environment

from onebase.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.e2e

SCRIPT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from server.fakes import FakeText, FakeWorker
from onebase.server.app import Parts, Report, serve
from onebase.server.config import EngineConfig, ServerConfig

class Broken(FakeWorker):
    def _GenerateJob(self, job):
        super()._GenerateJob(job)
        if job.sampling.max_new_tokens == 7:
            raise KeyError("the secret of life")

worker = Broken()
worker.failures += [KeyError("the secret of life"), MemoryError("the secret of life")] * 2
config = ServerConfig(engine=EngineConfig(model="fake"), port=0, port_file=Path({port_file!r}))
asyncio.run(serve(Parts(worker, FakeText()), config, Report()))
"""


def told(call: Callable[[], Any], messages: int = 0) -> tuple[Refusal, str]:
    """What a client is told after so many messages, and everything that has come to it with that."""
    count = 0
    with pytest.raises(grpc.RpcError) as caught:  # noqa: PT012
        for _ in call():
            count += 1
    assert count == messages
    error = caught.value
    initial, trailing = error.initial_metadata(), error.trailing_metadata()
    assert trailing  # the status itself is in it
    return refusal_of(error), f"{error.details()} {error.debug_error_string()} {initial} {trailing}"


@pytest.mark.fault(36, times=3)
def test_36_a_bug_shows_an_id_and_nothing_else(tmp_path: Path) -> None:
    port = tmp_path / "port"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), port_file=str(port))
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 30
        while not port.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        with grpc.insecure_channel(f"127.0.0.1:{int(port.read_text())}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.LogprobRequest(adapter="base", sequences=[pair((9,), (7,))])
            found = [told(lambda: stub.Logprob(request)) for _ in range(2)]
            stream = inference_pb2.GenerateRequest(
                adapter="base", prompts=[tokens_of(9)], sampling={"max_new_tokens": 2}, stream_tokens=True
            )
            found += [told(lambda: stub.Generate(stream)) for _ in range(2)]
            whole = len(list(stub.Generate(stream)))
            assert whole > 1
            stream.sampling.max_new_tokens = 7
            found.append(told(lambda: stub.Generate(stream), messages=7))  # in the middle, after all that was made
            assert len(stub.Logprob(request).results) == 1  # and it lives
    finally:
        process.terminate()
        log = process.communicate(timeout=20)[1]
    assert len({refusal.message for refusal, _ in found}) == 5
    for refusal, everything in found:
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        for leak in ("secret", "KeyError", "MemoryError", "Traceback"):
            assert leak not in everything
        opaque = refusal.message.split("internal error ")[1][:16]
        assert opaque in log  # where its story is
    assert "the secret of life" in log
