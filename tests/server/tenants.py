"""Servers that want tokens, and clients that have them."""

from __future__ import annotations

import grpc
from server.harness import Live

from onebase.server.config import EngineConfig, Security, ServerConfig
from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile
from onebase.v1 import (
    adapters_pb2_grpc,
    inference_pb2_grpc,
    server_pb2_grpc,
    sessions_pb2_grpc,
    training_pb2_grpc,
)


class _WithToken(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor
):
    def __init__(self, token):
        self._token = token

    def _send(self, continuation, details, request):
        details = grpc._interceptor._ClientCallDetails(
            details.method,
            details.timeout,
            [*(details.metadata or ()), ("authorization", f"Bearer {self._token}")],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        return continuation(details, request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _send


class Client:
    """The stubs of somebody who comes with a token."""

    def __init__(self, channel, token):
        self.token = token
        self.channel = grpc.intercept_channel(channel, _WithToken(token))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)


class Guarded(Live):
    """A running server that wants tokens."""

    def __init__(self, folder, *, worker=None, clock=None, security=None, **config):
        self.file = TokenFile(folder / "tokens.json")
        self.file.add("unused", (Scope.STATUS,), (), None)
        security = {"tokens": folder / "tokens.json", **(security or {})}
        super().__init__(
            ServerConfig(
                engine=EngineConfig(model="fake"), port=0, drain_seconds=5, security=Security(**security), **config
            ),
            worker,
            clock,
        )

    def make(self, tenant, *scopes, adapters=(), seconds=None):
        return self.file.add(tenant, scopes or tuple(Scope), adapters, seconds)

    def as_(self, tenant, *scopes, adapters=(), seconds=None):
        """A client with a fresh token."""
        return Client(self.channel, self.make(tenant, *scopes, adapters=adapters, seconds=seconds))
