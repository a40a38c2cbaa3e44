from __future__ import annotations

import logging
import re

import grpc
import pytest
from server.harness import Live, pair, refused, text_of

from onebase.server.config import EngineConfig, Limits, ServerConfig
from onebase.server.errors import InvalidArgument
from onebase.v1 import inference_pb2, server_pb2, sessions_pb2

ONE = [pair((9,), (7,))]


@pytest.mark.fault(36)
def test_a_bug_shows_an_id_to_the_client_and_its_story_to_the_log(live, caplog):
    live.worker.failures.append(ZeroDivisionError("the secret of life"))
    refusal = refused(live.inference.Logprob, inference_pb2.LogprobRequest(adapter="p1", sequences=ONE))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message
    assert "ZeroDivision" not in refusal.message
    (opaque,) = re.findall(r"internal error ([0-9a-f]{16})", refusal.message)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert opaque in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.fault(36)
def test_a_bug_in_a_stream_is_no_different(live):
    live.worker.failures.append(KeyError("the secret of life"))
    request = inference_pb2.GenerateRequest(adapter="p1", prompts=[text_of("a")], sampling={"max_new_tokens": 2})
    refusal = refused(live.inference.Generate, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message


@pytest.mark.fault(36)
def test_a_bug_of_a_service_is_no_different(live, monkeypatch):
    def broken(session_id):
        raise AttributeError("the secret of life")

    monkeypatch.setattr(live.edge.sessions, "get", broken)
    refusal = refused(live.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id="x"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message


@pytest.mark.parametrize("method", ["InferenceService/Logprob", "TrainingService/OptimStep", "ServerService/GetStatus"])
def test_bytes_that_are_no_message_are_refused_and_the_server_lives(live, method):
    refusal = refused(live.channel.unary_unary(f"/onebase.v1.{method}"), b"\xff\xff\xff\xff")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    live.server.GetServerInfo(server_pb2.GetServerInfoRequest())


@pytest.mark.fault(12)
def test_malformed_bytes_of_a_stream(live):
    refusal = refused(live.channel.unary_stream("/onebase.v1.InferenceService/Generate"), b"\xff\xff\xff\xff")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("method", ["/onebase.v1.InferenceService/Nothing", "/onebase.v2.A/B"])
def test_an_unknown_method_is_unimplemented(live, method):
    assert refused(live.channel.unary_unary(method), b"").code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.fault(13)
def test_a_message_over_the_limit_is_refused_and_one_under_it_is_not():
    limits = Limits(max_message_bytes=5 * 2**20)
    with Live(ServerConfig(engine=EngineConfig(model="fake"), port=0, limits=limits)) as live:

        def ask(size):
            return inference_pb2.LogprobRequest(adapter="base", sequences=[pair("x" * size, (1,))])

        full = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused(live.inference.Logprob, ask(5 * 2**20), bare=(full,)).code is full
        assert refused(live.inference.Logprob, ask(9 * 2**19)).reason == "CONTEXT_TOO_LONG"  # over gRPC's own 4 MiB


def test_one_line_is_logged_for_each_call_and_no_session_id_in_any(live, session, caplog):
    caplog.set_level(logging.DEBUG, logger="onebase")
    live.inference.Logprob(inference_pb2.LogprobRequest(session_id=session, sequences=ONE))
    refused(live.inference.Logprob, inference_pb2.LogprobRequest(session_id=session, adapter="nobody", sequences=ONE))
    live.server.GetServerInfo(server_pb2.GetServerInfoRequest())  # its line comes last
    lines = [record.getMessage() for record in caplog.records if "InferenceService/Logprob" in record.getMessage()]
    assert len(lines) == 2
    assert " OK " in lines[0]
    assert "NOT_FOUND ADAPTER_NOT_FOUND" in lines[1]
    assert session not in caplog.text


@pytest.mark.parametrize("letter", ["x", "é", "🙂", "\n", "%"])
def test_an_error_that_is_too_long_keeps_its_code_its_beginning_and_its_end(live, letter):
    message = f"peft_type is '{letter * 2_000_000}': use LORA"
    live.worker.failures.append(InvalidArgument("BAD", message, field=f"files[{letter * 100_000}].name"))
    refusal = refused(live.inference.Logprob, inference_pb2.LogprobRequest(adapter="p1", sequences=ONE))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD")
    assert refusal.message.startswith(f"peft_type is '{letter * 50}")
    assert "…" in refusal.message
    assert refusal.message.endswith("': use LORA")
    assert (refusal.field[:6], refusal.field[-6:]) == ("files[", "].name")
    assert len(refusal.message.encode()) <= 1200
