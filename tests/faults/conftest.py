"""Faults made for real: a server in a process of its own, a plain gRPC client, and peers that are killed or frozen.

Each test is named after its row of the table of faults; docs/security.md and ARCHITECTURE.md say the same in words.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from oracle.fixtures import FIXTURES
from server.harness import text_of
from server.tenants import Client
from support import RunningServer, environment, start_server

from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2

ENDED = 20
"""Engine steps, some tens of milliseconds: a cancel is one message and one step away, and a process that is killed
takes the kernel's time to close its connections beside that."""
QUOTA = 16
"""Requests that a tenant may have at once."""
PROMPT = "w5 w6 w7"
FLAGS = ("--threads", "1", "--kv-slots", "2", "--stream-idle-seconds", "60", "--drain-seconds", "1")


@dataclass(frozen=True)
class Place:
    """A server, its token file and its root."""

    server: RunningServer
    tokens: TokenFile
    root: Path
    channel: grpc.Channel
    operator: Client

    def as_(self, tenant: str, *scopes: Scope, adapters: tuple[str, ...] = ()) -> Client:
        """A client with a fresh token."""
        token = self.tokens.add(tenant, scopes or tuple(Scope), adapters, None)
        return Client(self.channel, token)

    def status(self) -> server_pb2.ServerStatus:
        """As the operator sees it."""
        return self.operator.server.GetStatus(server_pb2.GetStatusRequest())

    def rss(self) -> int:
        """Resident bytes of the server."""
        return int(psutil.Process(self.server.process.pid).memory_info().rss)

    @contextmanager
    def flat(self, most: int) -> Iterator[None]:
        """Sees to it that the server never has more than so many bytes above what it has now, inside the block."""
        before, highest, over = self.rss(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                highest[0] = max(highest[0], self.rss())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
        assert highest[0] - before < most, f"{(highest[0] - before) / 2**20:.0f} MiB more"

    @contextmanager
    def ends_within(self, most: int) -> Iterator[None]:
        """Sees to it that what the block ends makes at most so many engine steps more, however slow this machine is."""
        before = self.status().engine_steps
        yield
        self.wait_until(at_rest, 20)
        made = self.status().engine_steps - before
        assert made <= most, f"{made} engine steps more"

    def wait_until(self, holds: Callable[[server_pb2.ServerStatus], bool], seconds: float) -> float:
        """Seconds until the status is as it should be."""
        began = time.monotonic()
        while not holds(now := self.status()):
            assert time.monotonic() - began < seconds, now
            time.sleep(0.05)
        return time.monotonic() - began


@pytest.fixture(scope="session")
def make_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Place]]:
    """Starts servers, and ends them."""
    with ExitStack() as stack:

        def make(*flags: str, guarded: bool = True) -> Place:
            folder = tmp_path_factory.mktemp("faults")
            root = Path(shutil.copytree(FIXTURES, folder / "root"))
            tokens = TokenFile(folder / "tokens.json")
            tokens.add("unused", (Scope.STATUS,), (), None)
            guard = ("--tokens", str(folder / "tokens.json")) if guarded else ()
            server = stack.enter_context(
                start_server(
                    root / "base", "--policy", f"p={root / 'policy'}", "--reward", f"r={root / 'reward'}",
                    "--root", str(root), *guard, *FLAGS, *flags,
                )
            )  # fmt: skip
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            operator = Client(channel, tokens.add("operator", tuple(Scope), (), None))
            return Place(server, tokens, root, channel, operator)

        yield make


@pytest.fixture(scope="session")
def place(make_place: Callable[..., Place]) -> Place:
    """The server that most rows share; whatever a row does to it, it must live."""
    return make_place("--tenant-quota", f"requests={QUOTA},adapter_bytes=64M")


@pytest.fixture(autouse=True)
def the_server_lives(place: Place) -> Iterator[None]:
    """After each row the server answers as before, and nothing is left of what was asked."""
    yield
    assert place.server.process.poll() is None, place.server.text()
    place.wait_until(at_rest, 20)
    assert "Traceback" not in place.server.text(), place.server.text()


_numbers = itertools.count()


def at_rest(now: server_pb2.ServerStatus) -> bool:
    """Whether nothing is under way, and no completion has a place. Between two completions there are none either."""
    return now.kv_slots_used == 0 and all(one.running == 0 for one in now.queues)


def fresh(name: str) -> str:
    """A name that no test has used."""
    return f"{name}-{next(_numbers)}"


def downloaded(client: Client, name: str) -> tuple[int, dict[str, bytes]]:
    """An adapter's version, and its tensors and moments by file; the manifest, which holds the version, is left out."""
    parts = list(client.adapters.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(name=name, with_optimizer=True)))
    data, found, begin = b"".join(part.data for part in parts), {}, 0
    for file in parts[0].header.files:
        found[file.name] = data[begin : begin + file.bytes]
        begin += file.bytes
    assert begin == len(data)
    tensors = {name: content for name, content in found.items() if name.endswith(".safetensors")}
    assert tensors
    return parts[0].header.adapter.version, tensors


def endless(n: int = 1000) -> inference_pb2.GenerateRequest:
    """Completions that take minutes."""
    return inference_pb2.GenerateRequest(
        adapter="base",
        prompts=[text_of(PROMPT)],
        sampling={"max_new_tokens": 100, "n": n, "ignore_eos": True},
        stream_tokens=True,
    )


READER = """
import sys
sys.path.insert(0, {tests!r})
import grpc
from faults.conftest import endless
from server.tenants import Client
from onebase.client.channel import OPTIONS
with grpc.insecure_channel({address!r}, options=OPTIONS) as channel:
    try:
        for _ in Client(channel, {token!r}).inference.Generate(endless()):
            print("one", flush=True)
    except grpc.RpcError as error:
        print(error.code().name, flush=True)
"""


@pytest.fixture
def reader(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A process that reads an endless stream, and has begun to."""
    token = place.as_("red").token
    tests = str(Path(__file__).parents[1])
    script = READER.format(tests=tests, address=place.server.address, token=token)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
