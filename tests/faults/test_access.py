"""Who comes without a token, with another tenant's, or without a scope; against a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
from faults import fields
from faults.conftest import Place, fresh
from faults.test_peers import bits
from faults.uploads import POLICY, policy, upload
from server.harness import pair, refused, text_of
from server.tenants import Client
from server.test_tokens import PUBLIC, call, methods

from onebase.server.identity import Scope
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2

pytestmark = pytest.mark.e2e

NOT_FOUND = grpc.StatusCode.NOT_FOUND


def test_25_without_a_token_every_method_but_health_is_unauthenticated(place: Place) -> None:
    served = methods(place.channel, place.as_("red").token)
    assert len(served) > 20
    for name, streams in served.items():
        for header in (None, "Bearer ob_000000000000_guess"):
            refusal = call(place.channel, name, streams, header)
            if name not in PUBLIC:
                assert refusal is not None
                assert refusal.code is grpc.StatusCode.UNAUTHENTICATED, name


@pytest.fixture
def hidden(place: Place) -> Iterator[Hidden]:
    """What red has: an adapter of each kind, and a session that holds the lease of one."""
    red = place.as_("red")
    names = {}
    for kind in ("policy", "reward", "reference", "critic"):
        number = adapters_pb2.DESCRIPTOR.pool.FindEnumTypeByName("onebase.v1.AdapterKind").values_by_name
        value = number[f"ADAPTER_KIND_{kind.upper()}"].number
        names[kind] = fresh(f"hidden-{kind}")
        if kind in ("policy", "critic"):
            red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=names[kind], kind=value))
        else:
            own = place.root / "red" / names[kind]
            shutil.copytree(place.root / ("reward" if kind == "reward" else "policy"), own)
            red.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=names[kind], kind=value, path=names[kind]))
    session = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name=names["policy"])).session_id
    yield Hidden(red, session, names)
    for name in names.values():
        red.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name, session_id=session))
    red.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))


@dataclass(frozen=True)
class Hidden:
    client: Client
    session: str
    names: dict[str, str]

    def of(self, field: fields.Field) -> str:
        """The name of an adapter that this field could take, if it were the caller's."""
        last = field.path[-1]
        if field.path[0] == "rewards[0]":
            return self.names["reward"]
        return self.names[last if last in self.names else "policy"]


@pytest.fixture
def blue(place: Place) -> Iterator[tuple[Client, str]]:
    """Another tenant, which has a policy x and a session of its own."""
    blue = place.as_("blue")
    blue.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="x", value_head=True))
    session = blue.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="x")).session_id
    yield blue, session
    blue.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="x", session_id=session))
    blue.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))


def test_26_another_tenants_adapter_is_not_there_in_any_field_that_names_one(
    place: Place, hidden: Hidden, blue: tuple[Client, str]
) -> None:
    client, session = blue
    before = {name: bits(hidden.client, name) for name in hidden.names.values()}
    valid = fields.valid(session)
    for field in fields.places(fields.ADAPTERS):
        if field.names_what_is_made:  # `test_26_a_name_that_another_tenant_uses_is_free`
            continue
        name = hidden.of(field)
        told = []
        for one in (name, name.replace("hidden", "absent")):
            messages = fields.put(valid[field.method.name], field.path, one)
            refusal = fields.send(place.channel, client.token, field.method, messages)
            assert refusal is not None, (field.method.name, field.shown)
            assert (refusal.code, refusal.reason) == (NOT_FOUND, "ADAPTER_NOT_FOUND"), (field.method.name, field.shown)
            told.append((refusal.field, refusal.message.replace(one, "it")))
        assert told[0] == told[1]  # word for word what is said of one that nobody has
    assert {name: bits(hidden.client, name) for name in hidden.names.values()} == before


def test_26_another_tenants_session_is_not_there_in_any_field_that_names_one(
    place: Place, hidden: Hidden, blue: tuple[Client, str]
) -> None:
    client, session = blue
    valid = fields.valid(session)
    for field in fields.places(fields.SESSIONS):
        told = []
        for one in (hidden.session, "0" * 32):
            messages = fields.put(valid[field.method.name], field.path, one)
            refusal = fields.send(place.channel, client.token, field.method, messages)
            assert refusal is not None, (field.method.name, field.shown)
            told.append((refusal.code, refusal.reason, refusal.field, refusal.message.replace(one, "it")))
        assert told[0][:2] == (NOT_FOUND, "SESSION_NOT_FOUND"), (field.method.name, field.shown)
        assert told[0] == told[1]
    resumed = client.sessions.OpenSession(sessions_pb2.OpenSessionRequest(resume_session_id=hidden.session)).session_id
    assert resumed != hidden.session
    client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=resumed))
    kept = hidden.client.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=hidden.session))
    assert list(kept.leases) == [hidden.names["policy"]]


def test_26_a_name_that_another_tenant_uses_is_free(place: Place, hidden: Hidden, blue: tuple[Client, str]) -> None:
    """That it is taken would tell that somebody has it; and what replaces one's own leaves the other as it was."""
    client, _ = blue
    name = hidden.names["policy"]
    own = shutil.copytree(place.root / "policy_all", place.root / "blue" / name)
    before = bits(hidden.client, name)
    load = adapters_pb2.LoadAdapterRequest(name=name, kind=POLICY, path=name, replace=True)
    get = adapters_pb2.GetAdapterRequest(name=name)
    assert refused(client.adapters.GetAdapter, get).code is NOT_FOUND
    client.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=name))
    client.adapters.LoadAdapter(load)
    client.adapters.UploadAdapter(upload(name, policy(place)))
    client.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name))
    client.adapters.LoadAdapter(load)
    client.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=name))
    assert bits(hidden.client, name) == before
    shutil.rmtree(own)


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
