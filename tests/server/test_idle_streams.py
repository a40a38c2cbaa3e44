"""Streams whose clients neither read nor send: memory is bounded, and after the idle limit they are ended."""

from __future__ import annotations

import asyncio
import re
import time

import grpc
import pytest
from server.harness import Live, refusal_of, text_of

from onebase.server.config import EngineConfig, Security, ServerConfig
from onebase.server.jobs import GenerateJob
from onebase.server.unread import MOST
from onebase.v1 import adapters_pb2, inference_pb2, inference_pb2_grpc, types_pb2


def served():
    security = Security(stream_idle_seconds=0.5)
    return Live(ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=1, security=security))


@pytest.mark.fault(31)
def test_who_does_not_read_is_told_so_and_the_work_ends():
    with served() as live:
        live.worker.endless = True
        request = inference_pb2.GenerateRequest(
            adapter="base", prompts=[text_of("a")], sampling={"max_new_tokens": 20}, stream_tokens=True
        )
        # A connection that takes little in advance; by default it is some megabytes, which are the client's own.
        small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        channel = grpc.insecure_channel(f"127.0.0.1:{live.port}", options=small)
        answers = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        next(answers)
        (job,) = live.worker.wait_submitted(GenerateJob)
        live.worker.wait_done(job)  # nobody reads, so it is dropped
        time.sleep(1)
        try:
            list(answers)  # what was on its way already
        except grpc.RpcError as error:
            refusal = refusal_of(error)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
        # Whichever limit of what is not read comes first: of time, or of messages that wait.
        assert re.search(r"nothing was read for 0\.5 s|more than \d+ messages waited", refusal.message)
        assert refusal.retry_after == 1
        channel.close()


def test_who_reads_slowly_but_reads_is_served():
    with served() as live:
        request = inference_pb2.GenerateRequest(
            adapter="base", prompts=[text_of("a")], sampling={"max_new_tokens": 8}, stream_tokens=True
        )
        count = 0
        for _ in live.inference.Generate(request):
            time.sleep(0.2)
            count += 1
        assert count == 8


@pytest.mark.fault(31)
def test_an_upload_that_stops_is_ended():
    with served() as live:

        def parts():
            header = adapters_pb2.UploadAdapterHeader(
                name="p",
                kind=types_pb2.ADAPTER_KIND_POLICY,
                files=[
                    {"name": name, "bytes": 4, "sha256": "0" * 64}
                    for name in ("adapter_config.json", "adapter_model.safetensors")
                ],
            )
            yield adapters_pb2.UploadAdapterRequest(header=header)
            time.sleep(10)

        began = time.monotonic()
        try:
            live.adapters.UploadAdapter(parts())
        except grpc.RpcError as error:
            refusal = refusal_of(error)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_PRODUCER")
        assert time.monotonic() - began < 5


@pytest.mark.fault(31)
def test_streams_that_nobody_ever_reads_are_dropped():
    def tasks():
        return [task for task in live.on_loop(asyncio.all_tasks) if "_handle_rpc" in str(task.get_coro())]

    with served() as live:
        live.worker.endless = True
        request = inference_pb2.GenerateRequest(
            adapter="base", prompts=[text_of("a")], sampling={"max_new_tokens": 20}, stream_tokens=True
        )
        small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        channel = grpc.insecure_channel(f"127.0.0.1:{live.port}", options=small)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        before, held = len(tasks()), []
        for number in range(MOST + 4):
            held.append(stub.Generate(request))
            next(held[-1])
            (job,) = live.worker.wait_submitted(GenerateJob, number + 1)[number:]
            live.worker.wait_done(job)
        time.sleep(1)
        assert len(tasks()) - before <= MOST  # those that came first have given way
        with pytest.raises(grpc.RpcError) as told:
            list(held[-1])
        assert refusal_of(told.value).reason == "SLOW_CONSUMER"  # who reads in time is told so
        time.sleep(6)
        assert len(tasks()) - before == 0
        with pytest.raises(grpc.RpcError):
            list(held[-2])  # and who reads later does not wait for ever
        channel.close()
