"""A real gRPC server in a thread of its own, on a free port, with a fake worker behind it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from dataclasses import dataclass

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


TRANSPORTS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""What gRPC says by itself, without details; whatever else comes without any is an error that the server forgot."""

WAITING_IS_NO_HELP = {
    "LIMIT_EXCEEDED": "the request is larger than this server ever takes",
    "RANK_TOO_LARGE": "the same, of an adapter that is loaded",
    "KV_CACHE_TOO_SMALL": "one completion alone is longer than the whole cache",
    "QUOTA_ADAPTERS": "its own adapters stay until it deletes one",
    "QUOTA_ADAPTER_BYTES": "the same, and nothing else frees their bytes",
    "QUOTA_SAVED_BYTES": "what it has saved stays until somebody deletes it",
    "NO_MEMORY": "an adapter of that size has no room beside those that are there",
}
"""Reasons of RESOURCE_EXHAUSTED that never carry RetryInfo, and why: a client that waits would wait for ever."""

WAITING_MAY_HELP = {
    "QUOTA_COMPLETIONS": "unless one request wants more than its tenant may have at all",
    "OUT_OF_MEMORY": "unless the job had all memory that there is, and cannot be run alone either",
}
"""Reasons that carry RetryInfo or not, by what else is under way; their tests say which. All others always do."""


@dataclass(frozen=True)
class Refusal:
    code: grpc.StatusCode
    reason: str
    field: str
    message: str
    retry_after: float | None


def refusal_of(error, bare=()):
    """What a client is told by an RpcError: one ErrorInfo, and details that agree with it and with the code.

    `bare` are codes that the transport may give without details in this call, beside those that it always may.
    """
    status = rpc_status.from_call(error)
    if status is None:
        assert error.code() in TRANSPORTS.union(bare), (error.code(), error.details())
        told.note(error.code())
        return Refusal(error.code(), "", "", error.details(), None)
    info, retry = _one(status, error_details_pb2.ErrorInfo), _one(status, error_details_pb2.RetryInfo)
    bad = _one(status, error_details_pb2.BadRequest)
    assert info is not None, status
    assert info.domain == "onebase"
    assert re.fullmatch("[A-Z][A-Z0-9_]*", info.reason)
    fields = [one.field for one in bad.field_violations] if bad else [""]
    assert fields == [info.metadata["field"]]
    wait = None if retry is None else retry.retry_delay.ToMilliseconds() / 1000
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and info.reason not in WAITING_MAY_HELP:
        assert (wait is None) == (info.reason in WAITING_IS_NO_HELP), (info.reason, wait)
    assert wait is None or wait > 0
    told.note(error.code(), info.reason)
    return Refusal(error.code(), info.reason, fields[0], error.details(), wait)


def _one(status, kind):
    """The detail of this kind; None if there is none, and never two."""
    found = [detail for detail in status.details if detail.Is(kind.DESCRIPTOR)]
    assert len(found) <= 1
    for detail in found:
        message = kind()
        detail.Unpack(message)
        return message
    return None


def refused(call, *arguments, bare=(), **keywords):
    """Calls, expects an error, and returns what a client is told; `bare` as in `refusal_of`."""
    try:
        result = call(*arguments, **keywords)
        if hasattr(result, "__next__"):
            list(result)
    except grpc.RpcError as error:
        return refusal_of(error, bare)
    shown = result[:2] if isinstance(result, list) else result
    raise AssertionError(f"not refused: {str(shown)[:500]}")


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
