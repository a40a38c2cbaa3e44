"""kill -9 and start again: real processes, a plain gRPC client, nothing lost.

Each test says which rows of the table of faults it shows.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import numpy as np
import pytest
from faults import told
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from restarts.conftest import Start, checkpoints, died_of_sigkill

from onebase.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    types_pb2,
)

pytestmark = pytest.mark.e2e
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
        self.session = ""

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def open(self, name: str = "") -> str:
        request = sessions_pb2.OpenSessionRequest(ppo_adapter_name=name, label="plain", ttl_seconds=600)
        self.session = self.sessions.OpenSession(request).session_id
        return self.session

    def create(self, name: str = "p", request_id: str = "") -> types_pb2.Adapter:
        lora = types_pb2.LoraSpec(rank=4, alpha=8, target_modules=["all-linear"])
        return self.adapters.CreateAdapter(
            adapters_pb2.CreateAdapterRequest(
                session_id=self.session, request_id=request_id, name=name, lora=lora, value_head=True, seed=3
            )
        )

    def forward(self, name: str = "p", number: int = 0) -> training_pb2.ForwardBackwardResponse:
        row = training_pb2.TrainingSequence(
            sequence=types_pb2.Sequence(
                prompt=tokens(5, 6 + number),
                completion=tokens(7, 8, 9),
            )
        )
        return self.training.ForwardBackward(
            training_pb2.ForwardBackwardRequest(
                session_id=self.session,
                adapter=name,
                sequences=[row],
                cross_entropy=training_pb2.CrossEntropyLoss(),
            )
        )

    def step(self, name: str = "p", request_id: str = "", rate: float = 0.01) -> training_pb2.OptimStepResponse:
        return self.training.OptimStep(
            training_pb2.OptimStepRequest(
                session_id=self.session,
                request_id=request_id,
                adapter=name,
                adamw=training_pb2.AdamW(learning_rate=rate),
            )
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


def refused(call, *arguments, **named) -> tuple[Code, str]:  # type: ignore[no-untyped-def]
    """The code and the reason that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    code, reason = reason_of(caught.value)
    told.note(code, reason)
    return code, reason


def reason_of(error: grpc.RpcError) -> tuple[Code, str]:
    """An error's code and reason."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return error.code(), info.reason
    return error.code(), ""


def wait_until_durable(state: Path, version: int) -> None:
    """Until a checkpoint of this version is committed."""
    with closing(sqlite3.connect(f"file:{state / 'registry.sqlite'}?mode=ro", uri=True)) as store:
        for _ in range(600):
            if store.execute("SELECT 1 FROM checkpoints WHERE version = ?", (version,)).fetchone():
                return
            time.sleep(0.05)
    raise AssertionError(f"version {version} is not durable")


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("before_rename:kill@4", marks=pytest.mark.fault(1, times=3)),  # the download is written too
        pytest.param("after_rename:kill@3", marks=pytest.mark.fault(2, times=3)),
    ],
)
def test_a_kill_before_the_commit_leaves_the_checkpoint_before_and_sweeps_the_leftover(
    start: Start, state: Path, place: str
) -> None:
    """Faults 1 and 2: the third checkpoint (created, stepped, stepped) is never committed."""
    with start(*STEP, failpoints=place) as server, Plain(server.address) as client:
        client.open()
        client.create()
        client.train(request_id="one")
        before = client.weights()
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
        session = client.session
    assert len(checkpoints(state)) == 3
    with start(*STEP) as server, Plain(server.address) as client:
        assert len(checkpoints(state)) == 2
        assert client.version() == 1
        assert client.weights() == before
        client.session = session
        assert refused(client.step, request_id="two") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
        client.forward(number=1)
        assert client.step(request_id="two").adapter.version == 2


@pytest.mark.fault(3, 34, times=2)
def test_a_kill_after_the_commit_gives_the_retry_the_stored_answer_once(start: Start) -> None:
    """Fault 3, for every change whose answer outlives the process; 34 after a restart."""
    with start(*STEP, failpoints="after_commit:kill@3") as server, Plain(server.address) as client:
        session = client.open()
        made = client.create(request_id="make")
        client.train(request_id="one")
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.UNAVAILABLE, "")
        assert died_of_sigkill(server)
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        answer = client.step(request_id="two")
        assert (answer.adapter.version, answer.gradients_applied) == (2, 1)
        assert client.step(request_id="two") == answer
        assert client.step(request_id="one").adapter.version == 1
        assert client.version() == 2
        assert client.create(request_id="make") == made
        assert refused(client.step, request_id="two", rate=0.5) == (Code.ABORTED, "REQUEST_ID_REUSED")
        assert refused(client.create, request_id="again") == (Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
        delete = adapters_pb2.DeleteAdapterRequest(session_id=session, request_id="gone", name="p")
        client.adapters.DeleteAdapter(delete)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with start(*STEP) as server, Plain(server.address) as client:
        client.adapters.DeleteAdapter(delete)
        assert refused(client.version) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        client.session = session
        assert client.create().version == 3  # it goes on after what was deleted


@pytest.mark.fault(4, times=2)
def test_completions_that_were_cut_off_are_drawn_again_and_are_the_same(start: Start) -> None:
    """Fault 4, for a client that does it by itself."""
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        wanted = [(part.completion_index, part.tokens.data) for part in client.generate()]
        stream = client.generate()
        cut = next(stream)
        os.kill(server.process.pid, signal.SIGKILL)
        assert refused(list, stream) == (Code.UNAVAILABLE, "")
        server.process.wait()
    assert (cut.completion_index, cut.tokens.data) in wanted
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        assert sorted((part.completion_index, part.tokens.data) for part in client.generate()) == sorted(wanted)


@pytest.mark.fault(32, 33, times=2)
def test_sessions_come_back_with_their_leases_and_active_adapter(start: Start) -> None:
    """Faults 32 and 33 after a restart, and the session's own facts."""
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create("p")
        client.create("q")
        request = sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name="q")
        before = client.sessions.SetActiveAdapter(request)
        ended = client.open()
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=ended))
        client.session = session
        client.forward("p")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with start(*STEP) as server, Plain(server.address) as client:
        assert client.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)) == before
        gone = sessions_pb2.GetSessionRequest(session_id=ended)
        assert refused(client.sessions.GetSession, gone) == (Code.NOT_FOUND, "SESSION_NOT_FOUND")
        client.open()
        assert refused(client.forward, "p") == (Code.ABORTED, "NOT_LEASE_HOLDER")
        taking = sessions_pb2.OpenSessionRequest(ppo_adapter_name="p", ttl_seconds=60)
        assert refused(client.sessions.OpenSession, taking) == (Code.ABORTED, "ADAPTER_LEASED")
        client.session = session
        assert refused(client.step, "p") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")
        client.train("p")
        stale = training_pb2.OptimStepRequest(
            session_id=session, adapter="p", expected_version=0, adamw=training_pb2.AdamW(learning_rate=0.1)
        )
        client.forward("p")
        assert refused(client.training.OptimStep, stale) == (Code.ABORTED, "VERSION_MISMATCH")
        assert client.version("p") == 1


@pytest.mark.fault(29, times=2)
def test_a_damaged_checkpoint_is_data_loss_and_the_one_before_is_offered(start: Start, state: Path) -> None:
    """Fault 29."""
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create("p")
        client.create("q")
        client.train("p")
        before = client.weights("p")
        client.train("p", number=1)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with closing(sqlite3.connect(state / "registry.sqlite")) as store:
        newest = "SELECT folder FROM checkpoints JOIN adapters USING (uid) WHERE name = 'p' ORDER BY version DESC"
        (folder,) = store.execute(newest).fetchone()
    weights = state / "checkpoints" / folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        assert refused(client.forward, "p") == (Code.DATA_LOSS, "CHECKPOINT_DAMAGED")
        assert refused(client.create, "p") == (Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
        assert "--restore p=1" in server.text()
        client.train("q")  # serving goes on
    with start(*STEP, "--restore", "p=1") as server, Plain(server.address) as client:
        assert client.weights("p") == before
        assert client.version("p") == 3  # version 2 was given before, and means something else


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own, where this machine lets a test mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Takes all of the disk but some 40 KiB."""
    path, free = disk / "filler", os.statvfs(disk)
    with path.open("wb") as file:
        file.write(b"x" * (free.f_bavail * free.f_frsize - 40_000))
    return path


@pytest.mark.fault(28, times=2)
def test_a_full_disk_loses_nothing_and_passes(start: Start, state: Path, small_disk: Path) -> None:
    """Fault 28, on a real full disk: a step that is not durable is refused, until its retry makes it so."""
    state.symlink_to(small_disk)
    with start(*STEP) as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        before = client.weights()
        client.forward(number=1)
        filler = fill(small_disk)
        assert refused(client.step, request_id="two") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.step, request_id="two") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.create, "other") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused(client.version, "other") == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        client.forward(number=2)  # serving goes on
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with start(*STEP) as server, Plain(server.address) as client:  # also on a full disk
        client.session = session
        assert (client.version(), client.weights()) == (1, before)
        client.forward(number=1)
        assert refused(client.step, request_id="two") == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        filler.unlink()
        answer = client.step(request_id="two")
        assert (answer.adapter.version, answer.gradients_applied) == (2, 1)
        after = client.weights()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with start(*STEP) as server, Plain(server.address) as client:
        client.session = session
        assert client.step(request_id="two") == answer
        assert (client.version(), client.weights()) == (2, after)


@pytest.mark.fault(35, times=2)
def test_sigterm_lets_work_in_flight_end_and_no_other_begin(start: Start) -> None:
    """Fault 35: completions and a pass of training that were begun end; what comes later is refused."""
    with start("--checkpoint-seconds", "0", "--drain-seconds", "120") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        trained = client.weights()
        stream = client.generate(n=64)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 30
        health = health_pb2_grpc.HealthStub(client.channel)
        while health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < until
            time.sleep(0.01)
        for call in (client.version, client.forward, client.open):
            assert refused(call) == (Code.UNAVAILABLE, "DRAINING")
        assert server.process.poll() is None
        ends = [part for part in stream if part.finish_reason]
        assert len(ends) == 64
        assert server.process.wait(60) == 0
    with start() as server, Plain(server.address) as client:
        client.session = session
        assert client.weights() == trained


@pytest.mark.fault(35, times=2)
def test_sigterm_saves_what_no_checkpoint_has_and_a_kill_reuses_no_version(start: Start, state: Path) -> None:
    """Fault 35; and what is promised without `--durability step`."""
    with start("--checkpoint-seconds", "0") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train(request_id="one")
        client.train(number=1)
        saved = client.weights()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert refused(client.version)[0] is Code.UNAVAILABLE
    with start("--checkpoint-seconds", "0", "--checkpoint-steps", "2") as server, Plain(server.address) as client:
        client.session = session
        assert (client.version(), client.weights()) == (2, saved)
        assert client.step(request_id="one").adapter.version == 1
        for number in range(2):
            client.train(number=number)
        kept = client.weights()
        wait_until_durable(state, 4)
        client.train(number=5, request_id="lost")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with start() as server, Plain(server.address) as client:
        client.session = session
        assert client.weights() == kept
        assert client.version() > 5
        assert refused(client.step, request_id="lost") == (Code.FAILED_PRECONDITION, "NO_GRADIENTS")


def test_a_lease_that_ends_saves_the_adapter(start: Start, state: Path) -> None:
    with start("--checkpoint-seconds", "0") as server, Plain(server.address) as client:
        session = client.open()
        client.create()
        client.train()
        trained = client.weights()
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
        wait_until_durable(state, 1)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with start() as server, Plain(server.address) as client:
        assert client.weights() == trained


def test_a_second_server_and_another_base_are_refused(start: Start, port: int, state: Path) -> None:
    with start() as server, Plain(server.address) as client:
        client.open()
        client.create()
        with pytest.raises(RuntimeError, match="another server"):
            start(port=0).__enter__()
    from oracle.fixtures import FIXTURES
    from support import start_server

    with (
        pytest.raises(RuntimeError, match="belongs to the base"),
        start_server(FIXTURES / "base_gpt2", "--state", str(state)),
    ):
        raise AssertionError
