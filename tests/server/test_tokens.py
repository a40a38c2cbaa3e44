from __future__ import annotations

import json
import re
import time

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server.harness import refusal_of, refused
from server.tenants import Client, Guarded

from onebase.server.identity import Scope
from onebase.server.methods import RULES
from onebase.server.tokens import Doorman, TokenFile
from onebase.v1 import server_pb2

INFO = server_pb2.GetServerInfoRequest()
PUBLIC = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}


@pytest.fixture
def guarded(tmp_path):
    with Guarded(tmp_path) as server:
        yield server


def methods(channel, token):
    """All methods that reflection tells of: name → (whether requests stream, whether responses do)."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    metadata = (("authorization", f"Bearer {token}"),)

    def ask(**question):
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(**question)]), metadata=metadata
        )
        return answer

    found = {}
    for service in ask(list_services="").list_services_response.service:
        for raw in ask(file_containing_symbol=service.name).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for one in file.service:
                if f"{file.package}.{one.name}" == service.name:
                    for method in one.method:
                        name = f"/{service.name}/{method.name}"
                        found[name] = (method.client_streaming, method.server_streaming)
    return found


def call(channel, name, streams, token=None, data=b""):
    """Calls a method with bytes and gives its refusal; None where it was let in."""
    metadata = () if token is None else (("authorization", token),)
    kind = {(False, False): "unary_unary", (False, True): "unary_stream"}.get(
        streams, "stream_stream" if all(streams) else "stream_unary"
    )
    made = getattr(channel, kind)(name)
    try:
        answer = made(iter([data]) if streams[0] else data, timeout=2, metadata=metadata)
        if streams[1]:
            next(iter(answer), None)
            answer.cancel()
    except grpc.RpcError as error:
        return refusal_of(error)
    return None


def test_the_table_of_scopes_has_every_method_that_the_server_serves_and_no_other(guarded):
    served = methods(guarded.channel, guarded.make("red"))
    assert len(served) > 20
    assert set(served) == set(RULES)
    assert {name for name, rule in RULES.items() if rule.public} == PUBLIC
    used = {rule.scope for rule in RULES.values()} - {None}
    assert used == set(Scope)


@pytest.mark.fault(25, times=2)
def test_without_a_good_token_every_method_but_health_is_refused_streams_too(guarded):
    served = methods(guarded.channel, guarded.make("red"))
    assert set(served.values()) == {(False, False), (False, True), (True, False), (True, True)}
    good = guarded.make("red")
    bad = {
        "TOKEN_MISSING": [None, "", "Basic eDp5", good],
        "TOKEN_UNKNOWN": ["Bearer x", "Bearer ob_a_b", f"Bearer {good}x", f"Bearer {good[:-1]}", "Bearer "],
    }
    for name, streams in served.items():
        for reason, tokens in bad.items():
            for token in tokens:
                # Bytes that are no message: whoever is not let in does not even have them parsed.
                refusal = call(guarded.channel, name, streams, token, b"\xff\xff\xff\xff")
                if name in PUBLIC:
                    assert refusal is None or refusal.reason == "MALFORMED_MESSAGE", name
                else:
                    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason), name


@pytest.mark.parametrize("method", ["/onebase.v1.InferenceService/Nothing", "/onebase.v2.A/B"])
def test_without_a_token_a_method_that_is_not_there_looks_like_one_that_is(guarded, method):
    for streams in ((False, False), (False, True), (True, False), (True, True)):
        refusal = call(guarded.channel, method, streams)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
        refusal = call(guarded.channel, method, streams, f"Bearer {guarded.make('red', Scope.STATUS)}")
        assert refusal.code is grpc.StatusCode.UNIMPLEMENTED


def test_health_needs_no_token(guarded):
    stub = health_pb2_grpc.HealthStub(guarded.channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.fault(27, times=1)
@pytest.mark.parametrize("scope", Scope)
def test_each_method_is_opened_by_its_scope_and_by_no_other(guarded, scope):
    served = methods(guarded.channel, guarded.make("red"))
    only = guarded.make("red", scope)
    others = guarded.make("red", *(one for one in Scope if one is not scope))
    for name, streams in served.items():
        rule = RULES[name]
        closed = (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
        for token, opens in ((only, rule.scope in (None, scope)), (others, rule.scope is not scope)):
            refusal = call(guarded.channel, name, streams, f"Bearer {token}")
            is_closed = refusal is not None and (refusal.code, refusal.reason) == closed
            assert is_closed is not opens, (name, refusal)


def test_a_refusal_names_the_scope_and_never_the_token(guarded):
    token = guarded.make("red", Scope.REWARD)
    refusal = call(guarded.channel, "/onebase.v1.TrainingService/OptimStep", (False, False), f"Bearer {token}")
    assert "needs train" in refusal.message
    assert token.split("_")[1] in refusal.message
    assert token.split("_", 2)[2] not in refusal.message


@pytest.mark.fault(25)
def test_a_token_ends_when_it_expires(guarded):
    refusal = refused(guarded.as_("red", seconds=-1).server.GetServerInfo, INFO)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
    assert re.search(r"expired at 20\d\d-\d\d-\d\d \d\d:\d\d UTC: ask the server's operator", refusal.message)
    assert guarded.as_("red", seconds=60).server.GetServerInfo(INFO).base.model == "fake"


def test_a_running_server_sees_what_is_made_and_revoked(guarded):
    client = guarded.as_("red")
    client.server.GetServerInfo(INFO)
    guarded.file.revoke(client.token.split("_")[1])
    assert refused(client.server.GetServerInfo, INFO).reason == "TOKEN_UNKNOWN"
    guarded.as_("red").server.GetServerInfo(INFO)


@pytest.mark.fault(25)
@pytest.mark.parametrize("harm", ["gone", "garbage", "wrong"])
def test_while_the_file_cannot_be_read_nobody_is_let_in(guarded, tmp_path, harm):
    client, path = guarded.as_("red"), tmp_path / "tokens.json"
    client.server.GetServerInfo(INFO)
    whole = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_text("{" if harm == "garbage" else '{"tokens": [{"id": "x"}]}')
    for _ in range(2):  # a good token is not told that it is unknown: its owner would ask for another one in vain
        refusal = refused(client.server.GetServerInfo, INFO)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "TOKENS_UNREADABLE")
        assert refusal.retry_after
        assert refused(guarded.server.GetServerInfo, INFO).reason == "TOKEN_MISSING"
    path.write_bytes(whole)
    client.server.GetServerInfo(INFO)


def test_what_is_written_while_a_server_starts_is_seen(tmp_path, monkeypatch):
    file = TokenFile(tmp_path / "tokens.json")
    file.add("red", (Scope.STATUS,), (), None)
    read = TokenFile.read

    def slowly(self):
        there = read(self)
        if len(there) == 1:  # between the reading and whatever follows it
            monkeypatch.setattr(TokenFile, "read", read)
            made.append(file.add("blue", (Scope.STATUS,), (), None))
        return there

    made = []
    monkeypatch.setattr(TokenFile, "read", slowly)
    doorman = Doorman(tmp_path / "tokens.json")
    method = "/onebase.v1.ServerService/GetServerInfo"
    assert doorman.admit(method, {"authorization": f"Bearer {made[0]}"}).tenant == "blue"


def test_secrets_are_not_kept_and_the_file_is_its_owners_alone(tmp_path):
    path = tmp_path / "new" / "tokens.json"
    one, two = (TokenFile(path).add("red", (Scope.TRAIN,), ("p1",), 60) for _ in range(2))
    text = path.read_text()
    for token in (one, two):
        name, secret = token.split("_", 2)[1:]
        assert len(secret) == 43  # 256 bits
        assert name in text
        assert secret not in text
    assert path.stat().st_mode & 0o777 == 0o600
    assert len({record["hash"] for record in json.loads(text)["tokens"]}) == 2
    kept = list(TokenFile(path).read().values())
    assert [(one.tenant, one.scopes, one.adapters) for one in kept] == [("red", ("train",), ("p1",))] * 2
    assert abs(kept[0].expires - time.time() - 60) < 30


def test_without_tokens_the_server_is_open(live):
    live.server.GetServerInfo(INFO)
    Client(live.channel, "anything").server.GetServerInfo(INFO)
