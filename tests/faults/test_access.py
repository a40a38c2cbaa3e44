"""Who comes without a token, with another tenant's, or without a scope; against a real server."""

from __future__ import annotations

import grpc
import pytest
from faults.conftest import Place
from server.harness import pair, refused, text_of
from server.test_tokens import PUBLIC, call, methods

from onebase.server.identity import Scope
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2

pytestmark = pytest.mark.e2e


def test_25_without_a_token_every_method_but_health_is_unauthenticated(place: Place) -> None:
    served = methods(place.channel, place.as_("red").token)
    assert len(served) > 20
    for name, streams in served.items():
        for header in (None, "Bearer ob_000000000000_guess"):
            refusal = call(place.channel, name, streams, header)
            if name not in PUBLIC:
                assert refusal is not None
                assert refusal.code is grpc.StatusCode.UNAUTHENTICATED, name


def test_26_another_tenants_adapter_and_session_are_not_there(place: Place) -> None:
    red, blue = place.as_("red"), place.as_("blue")
    red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="hidden"))
    session = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="hidden")).session_id
    ask = inference_pb2.GenerateRequest(adapter="hidden", prompts=[text_of("w5")], sampling={"max_new_tokens": 2})
    assert list(red.inference.Generate(ask))
    refusal = refused(blue.inference.Generate, ask)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    never = inference_pb2.GenerateRequest(adapter="never", prompts=[text_of("w5")])
    assert refused(blue.inference.Generate, never).message == refusal.message.replace("hidden", "never")
    theirs = refused(blue.sessions.GetSession, sessions_pb2.GetSessionRequest(session_id=session))
    assert (theirs.code, theirs.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    red.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="hidden", session_id=session))


def test_27_a_token_without_the_scope_is_denied(place: Place) -> None:
    client = place.as_("red", Scope.REWARD)
    request = inference_pb2.RewardRequest(rewards=[{"adapter": "r"}], sequences=[pair("w5", "w6")])
    assert len(client.inference.Reward(request).results) == 1
    for method, message in (
        (client.adapters.CreateAdapter, adapters_pb2.CreateAdapterRequest(name="x")),
        (client.server.GetStatus, server_pb2.GetStatusRequest()),
        (client.inference.Generate, inference_pb2.GenerateRequest(adapter="base", prompts=[text_of("w5")])),
    ):
        refusal = refused(method, message)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
