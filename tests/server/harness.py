"""A real gRPC server in a thread of its own, on a free port, with a fake worker behind it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import grpc
import numpy as np
from faults import told
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from server.fakes import FakeText, FakeWorker

from onebase.server.app import Parts, Report, running
from onebase.server.config import EngineConfig, ServerConfig
from onebase.server.volatile import Volatile
from onebase.v1 import (
    adapters_pb2_grpc,
    inference_pb2_grpc,
    server_pb2_grpc,
    sessions_pb2_grpc,
    training_pb2_grpc,
    types_pb2,
)


class Clock:
    """Stands still until told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


class Live:
    """A running server: its stubs, its rooms, and the loop it runs on."""

    def __init__(self, config=None, worker=None, clock=None, keeper=None):
        self.config = config or ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5)
        self.worker = worker or FakeWorker()
        self.clock = clock or Clock()
        self.parts = Parts(self.worker, FakeText(), keeper or Volatile())
        self.adapters_seen = []
        self.error = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(20)
        if self.error is not None:
            raise self.error
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)
        return self

    def __exit__(self, *_):
        self.begin_stop()
        self.join()
        self.channel.close()

    def begin_stop(self):
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has stopped already
            self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self):
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def edge(self):
        return self._server.edge

    def on_loop(self, function, *arguments):
        """Runs a function on the server's loop and returns what it returns."""

        async def call():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)

    def uid(self, name):
        return self.on_loop(self.edge.registry.get, name, "name").uid

    def _main(self):
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        report = Report(
            adapter=lambda entry, seconds: self.adapters_seen.append(entry.name),
            ready=lambda port: setattr(self, "port", port),
        )
        async with running(self.parts, self.config, report, self.clock) as self._server:
            self._ready.set()
            await self._stopping.wait()


@dataclass(frozen=True)
class Refusal:
    code: grpc.StatusCode
    reason: str
    field: str
    message: str
    retry_after: float | None


def refusal_of(error):
    """What a client is told by an RpcError; every status has one ErrorInfo, and details that agree."""
    status = rpc_status.from_call(error)
    if status is None:
        told.note(error.code())
        return Refusal(error.code(), "", "", error.details(), None)
    found = SimpleNamespace(reason="", field="", retry_after=None)
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            assert info.domain == "onebase"
            assert not found.reason
            assert re.fullmatch("[A-Z][A-Z0-9_]*", info.reason)
            found.reason = info.reason
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            (violation,) = bad.field_violations
            assert violation.field == info.metadata["field"]
            found.field = violation.field
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            found.retry_after = retry.retry_delay.ToMilliseconds() / 1000
    assert found.reason
    told.note(error.code(), found.reason)
    return Refusal(error.code(), found.reason, found.field, error.details(), found.retry_after)


def refused(call, *arguments, **keywords):
    """Calls, expects an error, and returns what a client is told."""
    try:
        result = call(*arguments, **keywords)
        if hasattr(result, "__next__"):
            list(result)
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"not refused: {result}")


def ids(*tokens, dtype=types_pb2.DTYPE_INT32):
    kind = {types_pb2.DTYPE_INT32: "<i4", types_pb2.DTYPE_INT64: "<i8"}[dtype]
    array = np.array(tokens, dtype=kind)
    return types_pb2.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def floats(*numbers):
    array = np.array(numbers, dtype="<f4")
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=array.shape, data=array.tobytes())


def mask(*flags):
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_BOOL, shape=[len(flags)], data=bytes(flags))


def tokens_of(*tokens):
    return types_pb2.Content(tokens=ids(*tokens))


def text_of(text):
    return types_pb2.Content(text=text)


def pair(prompt, completion):
    """A sequence; strings are texts, tuples are token ids, None is not set."""
    contents = [
        None if one is None else text_of(one) if isinstance(one, str) else tokens_of(*one)
        for one in (prompt, completion)
    ]
    return types_pb2.Sequence(prompt=contents[0], completion=contents[1])


def array(tensor):
    """What a tensor holds, as numpy."""
    kinds = {types_pb2.DTYPE_INT32: "<i4", types_pb2.DTYPE_INT64: "<i8", types_pb2.DTYPE_FLOAT32: "<f4"}
    return np.frombuffer(tensor.data, dtype=kinds[tensor.dtype]).reshape(tuple(tensor.shape))


def eventually(check):
    """Returns when it holds; fails when it does not within some seconds."""
    for _ in range(400):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")
