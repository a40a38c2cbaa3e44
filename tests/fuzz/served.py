"""A server of the fuzzers' own, what must stay right in it, and its health meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from fuzz import calls
from fuzz.files import Files
from fuzz.findings import Findings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oracle.fixtures import FIXTURES
from server.harness import pair
from server.tenants import Client
from support import RunningServer, start_server

from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile
from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2

HEALTH_SECONDS = 1.0
"""In which health answers, where nobody else wants the cores."""
FLAGS = ("--threads", "1", "--kv-slots", "4", "--stream-idle-seconds", "5", "--drain-seconds", "1")
TENANT = "adapter_bytes=64M,adapters=64"


@dataclass
class Server:
    """A server, and those who call it."""

    running: RunningServer
    token: str
    channel: grpc.Channel
    session: str = ""
    spare: str = ""
    """Another session, to be closed."""
    _preparing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fuzzer(self) -> Client:
        """A plain client of the fuzzing tenant."""
        return Client(self.channel, self.token)

    def prepare(self) -> list[str]:
        """Has the tenant's adapters and sessions there, whatever was done to them; what stood in the way of that."""
        with self._preparing:
            return self._prepare()

    def _prepare(self) -> list[str]:
        adapters, failed = self.fuzzer.adapters, []

        def ask(method: Any, request: Any, *expected: grpc.StatusCode) -> Any:
            try:
                return method(request, timeout=60)
            except grpc.RpcError as error:
                if error.code() not in expected:
                    failed.append(f"{error.code().name}: {error.details()}")
                return None

        for name in calls.NAMED:
            there = adapters_pb2.CreateAdapterRequest(name=name, value_head=True)
            ask(adapters.CreateAdapter, there, grpc.StatusCode.ALREADY_EXISTS)
        self.session = self._live(ask, self.session, "x")
        self.spare = self._live(ask, self.spare, "")
        return failed

    def _live(self, ask: Callable[..., Any], session: str, adapter: str) -> str:
        """This session, or a new one if it is over."""
        kept = sessions_pb2.KeepAliveRequest(session_id=session)
        if session and ask(self.fuzzer.sessions.KeepAlive, kept, grpc.StatusCode.NOT_FOUND) is not None:
            return session
        anew = sessions_pb2.OpenSessionRequest(ppo_adapter_name=adapter, ttl_seconds=600)
        opened = ask(self.fuzzer.sessions.OpenSession, anew)
        return opened.session_id if opened is not None else session

    def rss(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.running.process.pid).memory_info().rss)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A server of its own, with a tenant that may do everything."""
    root = Path(shutil.copytree(FIXTURES, folder / "root"))
    shutil.copytree(FIXTURES / "policy", root / "fuzz" / "policy")  # a tenant loads from a directory of its own
    tokens = TokenFile(folder / "tokens.json")
    token = tokens.add("fuzz", tuple(Scope), (), None)
    places = ("--root", str(root), "--tokens", str(folder / "tokens.json"), "--tenant-quota", TENANT)
    adapters = ("--policy", f"p={root / 'policy'}", "--reward", f"r={root / 'reward'}")
    with start_server(root / "base", *adapters, *places, *FLAGS, wait=400) as running:
        channel = grpc.insecure_channel(running.address)
        server = Server(running, token, channel)
        if failed := server.prepare():
            raise RuntimeError(f"the fuzzing tenant has nothing to try: {failed}")
        yield server
        channel.close()


def probe(server: Server) -> bytes:
    """Numbers that nobody may change: the operator's policy, its reward, and the base."""
    inference, sequences = server.fuzzer.inference, [pair((5, 6, 7, 8), (9, 10, 11)), pair("w5 w6", "w7")]
    answers: list[Any] = [
        inference.Logprob(inference_pb2.LogprobRequest(adapter=name, sequences=sequences, return_entropy=True))
        for name in ("p", "base")
    ]
    answers.append(inference.Reward(inference_pb2.RewardRequest(rewards=[{"adapter": "r"}], sequences=sequences)))
    return b"".join(answer.SerializeToString(deterministic=True) for answer in answers)


def own_files(server: Server) -> list[Files]:
    """Whole adapters: as PEFT wrote them, and as the server sends one that was trained."""
    fuzzer = server.fuzzer
    row = training_pb2.ForwardBackwardRequest.FromString(calls.valid_requests(server.session)["ForwardBackward"][0])
    fuzzer.training.ForwardBackward(row)
    step = training_pb2.OptimStepRequest(session_id=server.session, adapter="x", adamw={"learning_rate": 1e-3})
    fuzzer.training.OptimStep(step)
    parts = list(fuzzer.adapters.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(name="x", with_optimizer=True)))
    data, files, begin = b"".join(part.data for part in parts), {}, 0
    for one in parts[0].header.files:
        files[one.name], begin = data[begin : begin + one.bytes], begin + one.bytes
    peft = [
        {file.name: file.read_bytes() for file in (FIXTURES / name).iterdir()}
        for name in ("policy", "policy_all", "reward")
    ]
    tokenizer = {name: (FIXTURES / "base" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    return [*peft, {**peft[0], **tokenizer}, files, files, files]


class Watch(threading.Thread):
    """Asks for the server's health all the time."""

    def __init__(self, server: Server, findings: Findings) -> None:
        super().__init__(daemon=True)
        self._server, self._findings, self._stop_it = server, findings, threading.Event()

    def run(self) -> None:
        """Until it is stopped."""
        with grpc.insecure_channel(self._server.running.address) as channel:
            stub, missed = health_pb2_grpc.HealthStub(channel), 0
            while not self._stop_it.wait(0.25):
                began = time.monotonic()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                    fine = answer.status == health_pb2.HealthCheckResponse.SERVING
                except grpc.RpcError:
                    fine = False
                took = time.monotonic() - began
                self._findings.health_longest = max(self._findings.health_longest, took)
                crowd = os.getloadavg()[0] / (os.cpu_count() or 1)  # programs that want a core, for each core
                missed = 0 if fine and took <= HEALTH_SECONDS * max(1.0, crowd) else missed + 1
                if missed == 2:  # once may be this machine's other work
                    self._findings.add("calls", f"hang: health took {took:.1f} s, or was not SERVING")

    def stop(self) -> None:
        """Ends it."""
        self._stop_it.set()
        self.join()
