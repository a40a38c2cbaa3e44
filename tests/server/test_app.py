from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server.fakes import FakeWorker
from server.harness import Live, pair, refused

from onebase.server.app import SERVICES
from onebase.server.config import AdapterSource, ConfigError, EngineConfig, Limits, ServerConfig
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import AdapterKind, CreateAdapterJob, LoadAdapterJob, LoraSpec, Pooling, ScoreJob
from onebase.server.listening import check_address, server_options
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, types_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def config(**more):
    return ServerConfig(**{"engine": EngineConfig(model="fake"), "port": 0, "drain_seconds": 20, **more})


def health(live, service=""):
    stub = health_pb2_grpc.HealthStub(live.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service)).status


def test_reflection_lists_every_service_and_knows_their_files(live):
    stub = reflection_pb2_grpc.ServerReflectionStub(live.channel)
    request = reflection_pb2.ServerReflectionRequest
    listing, found = stub.ServerReflectionInfo(
        iter([request(list_services=""), request(file_containing_symbol="onebase.v1.InferenceService")])
    )
    assert {one.name for one in listing.list_services_response.service} == {
        "onebase.v1.AdapterService",
        "onebase.v1.InferenceService",
        "onebase.v1.ServerService",
        "onebase.v1.SessionService",
        "onebase.v1.TrainingService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert found.file_descriptor_response.file_descriptor_proto


def test_every_service_is_healthy_once_it_serves(live):
    assert len(SERVICES) == 5
    for service in ("", *SERVICES):
        assert health(live, service) == SERVING


def test_health_can_be_watched(live):
    watch = health_pb2_grpc.HealthStub(live.channel).Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
    assert next(watch).status == SERVING
    live.begin_stop()
    assert next(watch).status == NOT_SERVING


def test_health_says_so_while_the_engine_makes_no_progress():
    with Live(config(stall_seconds=10)) as live:
        watch = health_pb2_grpc.HealthStub(live.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        live.worker.stuck = 11.0
        assert next(watch).status == NOT_SERVING
        live.worker.stuck = 0.0
        assert next(watch).status == SERVING


def test_the_named_adapters_are_there_from_the_start(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    named = config(
        rewards=(AdapterSource("r1", tmp_path / "link/r1", append_eos=False, pooling=Pooling.LAST_NOT_PAD),),
        references=(AdapterSource("ref", tmp_path / "ref"),),
        critics=(AdapterSource("judge", None), AdapterSource("c1", tmp_path / "c1")),
        policies=(AdapterSource("fresh", None), AdapterSource("old", tmp_path / "old")),
        policy_rank=4,
        policy_alpha=7.5,
    )
    with Live(named) as live:
        assert live.adapters_seen == ["r1", "ref", "judge", "c1", "fresh", "old"]
        adapters = live.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
        assert [(one.name, one.value_head, one.leased) for one in adapters] == [
            ("c1", True, False),
            ("fresh", True, False),
            ("judge", True, False),
            ("old", True, False),
            ("r1", False, False),
            ("ref", False, False),
        ]
        jobs = live.worker.executed
        assert [job.path for job in jobs if isinstance(job, LoadAdapterJob)] == [
            tmp_path / "r1",
            tmp_path / "ref",
            tmp_path / "c1",
            tmp_path / "old",
        ]
        kinds = [job.kind for job in jobs if isinstance(job, LoadAdapterJob)]
        assert kinds == [AdapterKind.REWARD, AdapterKind.REFERENCE, AdapterKind.CRITIC, AdapterKind.POLICY]
        made = [job for job in jobs if isinstance(job, CreateAdapterJob)]
        assert [(job.name, job.kind) for job in made] == [
            ("judge", AdapterKind.CRITIC),
            ("fresh", AdapterKind.POLICY),
        ]
        assert [job.lora for job in made] == [LoraSpec(rank=4, alpha=7.5)] * 2
        reward = next(one for one in adapters if one.name == "r1")
        assert (reward.append_eos, reward.pooling) == (False, types_pb2.POOLING_LAST_NOT_PAD)


def test_until_the_adapters_are_there_calls_are_refused_and_health_says_so():
    worker = FakeWorker()
    begun, go = threading.Event(), threading.Event()
    seen = {}

    def slowly(job):
        begun.set()
        assert go.wait(20)

    worker.before = slowly
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    live = Live(config(port=port, policies=(AdapterSource("p1", None),)), worker)

    def look():
        assert begun.wait(20)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            live.channel = channel
            seen["health"] = health(live)
            call = channel.unary_unary("/onebase.v1.ServerService/GetStatus", lambda _: b"", lambda raw: raw)
            seen["refusal"] = refused(call, None, wait_for_ready=True)
        go.set()

    looker = threading.Thread(target=look)
    looker.start()
    with live:
        looker.join()
        assert seen["health"] == NOT_SERVING
        assert (seen["refusal"].code, seen["refusal"].reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")
        assert seen["refusal"].retry_after == 1
        assert health(live) == SERVING


def test_an_adapter_that_does_not_load_stops_the_server_with_its_reason():
    worker = FakeWorker()
    worker.failures.append(FailedPrecondition("NO_SCORE_HEAD", "this adapter has no score head"))
    with (
        pytest.raises(FailedPrecondition, match="no score head"),
        Live(config(policies=(AdapterSource("p", None),)), worker),
    ):
        pass
    with pytest.raises(Exception, match="drains"):
        worker.submit(CreateAdapterJob(uid=1, name="x", lora=LoraSpec(), value_head=False))


def test_draining_finishes_what_runs_and_refuses_what_comes(live):
    live.worker.hold(ScoreJob)
    running = live.inference.Logprob.future(inference_pb2.LogprobRequest(adapter="p1", sequences=[pair((9,), (7,))]))
    live.worker.wait_submitted(ScoreJob)
    live.begin_stop()
    with live.worker._wake:
        assert live.worker._wake.wait_for(lambda: live.worker._draining, timeout=20)
    assert health(live) == NOT_SERVING
    refusal = refused(live.server.GetServerInfo, server_pb2.GetServerInfoRequest())
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    live.worker.release()
    assert running.result(timeout=20).adapter.name == "p1"
    live.join()


def test_what_does_not_finish_in_time_is_ended():
    with Live(config(drain_seconds=0.1)) as live:
        live.worker.hold(ScoreJob)
        future = live.inference.Logprob.future(
            inference_pb2.LogprobRequest(adapter="base", sequences=[pair((9,), (7,))])
        )
        live.worker.wait_submitted(ScoreJob)
        live.begin_stop()
        assert future.code() is grpc.StatusCode.UNAVAILABLE
        live.join()


def test_a_taken_port_is_an_error_that_says_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"), Live(config(port=port)):
            pass
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
            check_address(config(port=port))
    check_address(config(port=port))


def test_a_second_server_cannot_share_the_port(live):
    with pytest.raises(ConfigError), Live(config(port=live.port)):
        pass


def test_the_port_file_has_the_port(tmp_path):
    with Live(config(port_file=tmp_path / "port")) as live:
        assert (tmp_path / "port").read_text() == f"{live.port}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["port"]


def test_dead_peers_are_noticed_and_messages_bounded():
    options = dict(server_options(Limits(max_message_bytes=1234)))
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 1234
    assert options["grpc.http2.ping_timeout_ms"] <= 5000
    assert options["grpc.keepalive_time_ms"] <= 10_000
    assert options["grpc.so_reuseport"] == 0


SCRIPT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from server.fakes import FakeText, FakeWorker
from onebase.server.app import Parts, Report, serve
from onebase.server.config import AdapterSource, EngineConfig, ServerConfig

config = ServerConfig(
    engine=EngineConfig(model="fake"), port=0, port_file=Path({port_file!r}), policies=(AdapterSource("p", None),)
)
report = Report(ready=lambda port: print("ready", flush=True), draining=lambda: print("draining", flush=True))
asyncio.run(serve(Parts(FakeWorker(), FakeText()), config, report))
print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_process_with_exit_code_0(tmp_path, number):
    tests = str(Path(__file__).parents[1])
    script = textwrap.dedent(SCRIPT.format(tests=tests, port_file=str(tmp_path / "port")))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # nothing to sweep of others that were killed
    )
    try:
        assert process.stdout.readline() == "ready\n"
        port = int((tmp_path / "port").read_text())
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest()).status == SERVING
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (0, "draining\nstopped\n", "")
