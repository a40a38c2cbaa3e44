"""A plain gRPC client, and what it is told."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from support import RunningServer

from onebase.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    types_pb2,
)
from server import harness

STEP = ("--durability", "step")
Code = grpc.StatusCode


def tokens(*ids: int) -> types_pb2.Content:
    data = np.array(ids, dtype="<i8").tobytes()
    return types_pb2.Content(tokens=types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=[len(ids)], data=data))


class Plain:
    """A gRPC client without any comfort: nothing is retried."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)])
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)
        self.session = ""

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def open(self, name: str = "") -> str:
        request = sessions_pb2.OpenSessionRequest(ppo_adapter_name=name, label="plain", ttl_seconds=600)
        self.session = self.sessions.OpenSession(request).session_id
        return self.session

    def close(self) -> None:
        self.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=self.session))

    def create(self, name: str = "p", request_id: str = "") -> types_pb2.Adapter:
        lora = types_pb2.LoraSpec(rank=4, alpha=8, target_modules=["all-linear"])
        return self.adapters.CreateAdapter(
            adapters_pb2.CreateAdapterRequest(
                session_id=self.session, request_id=request_id, name=name, lora=lora, value_head=True, seed=3
            )
        )

    def passed(self, name: str = "p", number: int = 0, count: int = 1) -> training_pb2.ForwardBackwardRequest:
        """A pass over so many sequences."""
        row = training_pb2.TrainingSequence(
            sequence=types_pb2.Sequence(
                prompt=tokens(5, 6 + number),
                completion=tokens(7, 8, 9),
            )
        )
        return training_pb2.ForwardBackwardRequest(
            session_id=self.session,
            adapter=name,
            sequences=[row] * count,
            cross_entropy=training_pb2.CrossEntropyLoss(),
        )

    def forward(self, name: str = "p", number: int = 0) -> training_pb2.ForwardBackwardResponse:
        return self.training.ForwardBackward(self.passed(name, number))

    def step(self, name: str = "p", request_id: str = "", rate: float = 0.01) -> training_pb2.OptimStepResponse:
        return self.training.OptimStep(self.stepped(name, request_id, rate))

    def stepped(self, name: str = "p", request_id: str = "", rate: float = 0.01) -> training_pb2.OptimStepRequest:
        return training_pb2.OptimStepRequest(
            session_id=self.session,
            request_id=request_id,
            adapter=name,
            adamw=training_pb2.AdamW(learning_rate=rate),
        )

    def train(self, name: str = "p", request_id: str = "", number: int = 0) -> training_pb2.OptimStepResponse:
        self.forward(name, number)
        return self.step(name, request_id)

    def score(self, adapter: str = "base") -> inference_pb2.LogprobResponse:
        row = types_pb2.Sequence(prompt=tokens(5, 6), completion=tokens(7, 8, 9))
        return self.inference.Logprob(inference_pb2.LogprobRequest(adapter=adapter, sequences=[row]))

    def generate(self, name: str = "p", n: int = 8) -> Iterator[inference_pb2.GenerateResponse]:
        sampling = inference_pb2.SamplingParams(max_new_tokens=48, n=n, seed=3, ignore_eos=True)
        return self.inference.Generate(
            inference_pb2.GenerateRequest(
                session_id=self.session,
                adapter=name,
                prompts=[tokens(5, 6)],
                sampling=sampling,
                stream_tokens=True,
            )
        )

    def version(self, name: str = "p") -> int:
        return self.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name)).version

    def weights(self, name: str = "p") -> dict[str, bytes]:
        """The adapter's files but for the manifest, with its optimizer."""
        request = adapters_pb2.DownloadAdapterRequest(name=name, with_optimizer=True)
        parts = list(self.adapters.DownloadAdapter(request))
        return {file.name: file.sha256 for file in parts[0].header.files if file.name.endswith(".safetensors")}


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Code, str]:
    """The code and the reason that a call ends with; the rest of what it is told is checked (`harness.refusal_of`)."""
    refusal = harness.refused(call, *arguments, **named)
    return refusal.code, refusal.reason


def reason_of(error: grpc.RpcError) -> tuple[Code, str]:
    """An error's code and reason, checked likewise."""
    refusal = harness.refusal_of(error)
    return refusal.code, refusal.reason


def kill(server: RunningServer) -> None:
    """kill -9."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()


def newest(state: Path, name: str) -> Path:
    """The directory of an adapter's newest checkpoint."""
    with closing(sqlite3.connect(state / "registry.sqlite")) as store:
        query = "SELECT folder FROM checkpoints JOIN adapters USING (uid) WHERE name = ? ORDER BY version DESC"
        (folder,) = store.execute(query, (name,)).fetchone()
    return state / "checkpoints" / str(folder)


def damage(file: Path) -> None:
    """Flips its last bit."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def wait_until_durable(state: Path, version: int) -> None:
    """Until a checkpoint of this version is committed."""
    with closing(sqlite3.connect(f"file:{state / 'registry.sqlite'}?mode=ro", uri=True)) as store:
        for _ in range(600):
            if store.execute("SELECT 1 FROM checkpoints WHERE version = ?", (version,)).fetchone():
                return
            time.sleep(0.05)
    raise AssertionError(f"version {version} is not durable")
