"""A server of the contract in this process, whose answers can be told by counting, and which fails when told to."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from client import services
from onebase.v1 import (
    adapters_pb2_grpc,
    inference_pb2_grpc,
    server_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2_grpc,
    types_pb2,
)

OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
]


@dataclass
class FakeServer:
    """State and record of a fake server.

    The score of a sequence is the length of its completion (characters of a text, ids of an array), plus 100 for
    every adapter after the first. A completion is the prompt's own characters or ids, over and over.
    """

    requests: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, deque] = field(default_factory=lambda: defaultdict(deque))
    sessions: dict[str, sessions_pb2.Session] = field(default_factory=dict)
    adapters: dict[str, types_pb2.Adapter] = field(default_factory=dict)
    stored: dict[str, object] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    uploads: dict[str, bytes] = field(default_factory=dict)
    """The bytes of each upload, by the adapter's name."""
    download: list = field(default_factory=list)
    """The messages of the next downloads."""
    gradients: int = 0
    attends: bool = False
    """Whether sessions can be attended; otherwise they are kept alive by calls."""
    client_states: dict[str, bytes] = field(default_factory=dict)
    hold: threading.Event | None = None
    """Where it is set, streams stop after their first message until it is set, or the client is gone."""
    cuts: int = 0
    """So many streams are cut off after their first message."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    grpc_server: grpc.Server | None = None

    @property
    def target(self):
        return f"127.0.0.1:{self.port}"

    def fail(self, method, *failures):
        """The next calls of the method end so; None lets one pass."""
        self.failures[method].extend(failures)

    def wait_for(self, method, count):
        """Returns when so many calls of the method have come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests[method]) >= count, timeout=60)

    def start(self, port=0):
        self.grpc_server = grpc.server(ThreadPoolExecutor(max_workers=8), options=OPTIONS)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(services.Inference(self), self.grpc_server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(services.Training(self), self.grpc_server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(services.Adapters(self), self.grpc_server)
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(services.Sessions(self), self.grpc_server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(services.Server(self), self.grpc_server)
        self.port = self.grpc_server.add_insecure_port(f"127.0.0.1:{port}")
        self.grpc_server.start()
        return self

    def stop(self):
        if self.hold is not None:
            self.hold.set()
        self.grpc_server.stop(0).wait()

    def answer(self, method, request, context, work):
        """Records a call, fails it if that is its turn, and otherwise does its work."""
        with self.arrived:
            self.requests[method].append(request)
            failure = self.failures[method].popleft() if self.failures[method] else None
            self.arrived.notify_all()
        if failure is not None and not failure.after_the_work:
            context.abort_with_status(failure.status())
        with self.lock:
            response = work()
        if failure is not None:
            context.abort_with_status(failure.status())
        return response

    def once(self, request, work):
        """What the contract promises of a request_id: the work is done once, and a repeated id gets its answer."""
        if request.request_id not in self.stored:
            self.stored[request.request_id] = work()
        return self.stored[request.request_id]

    def active(self, request, name=""):
        session = self.sessions.get(request.session_id)
        if session is None:
            return ""
        if name:
            session.ppo_adapter_name = name
        return session.ppo_adapter_name
