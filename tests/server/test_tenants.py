from __future__ import annotations

import json

import grpc
import pytest
from server.conftest import bind
from server.harness import pair, refused, text_of
from server.tenants import Guarded

from onebase.server.config import AdapterSource
from onebase.server.identity import Scope
from onebase.server.jobs import AdapterKind, ScoreJob
from onebase.server.paths import Roots
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2, types_pb2

ONE = [pair((9,), (7,))]
Create, Open = adapters_pb2.CreateAdapterRequest, sessions_pb2.OpenSessionRequest
Session, Activate = sessions_pb2.GetSessionRequest, sessions_pb2.SetActiveAdapterRequest
HIDDEN = (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


@pytest.fixture
def guarded(tmp_path):
    """A server with the operator's rewards r1 and r2, policy shared and critic judge."""
    policies, critics = (AdapterSource("shared", None),), (AdapterSource("judge", None),)
    with Guarded(
        tmp_path, policies=policies, critics=critics, security={"audit_log": tmp_path / "audit.jsonl"}
    ) as server:
        for name in ("r1", "r2"):
            server.on_loop(bind, server, name, AdapterKind.REWARD)
        yield server


def names(client):
    return [one.name for one in client.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters]


def status(client):
    return client.server.GetStatus(server_pb2.GetStatusRequest())


def code(refusal):
    return refusal.code, refusal.reason


@pytest.mark.fault(26)
def test_another_tenants_adapter_is_not_there_in_any_method(guarded, tmp_path):
    red, blue = guarded.as_("red"), guarded.as_("blue")
    red.adapters.CreateAdapter(Create(name="mine", value_head=True))
    mine = blue.sessions.OpenSession(Open(label="blue's")).session_id
    calls = [
        (blue.adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name="mine")),
        (blue.adapters.DeleteAdapter, adapters_pb2.DeleteAdapterRequest(name="mine")),
        (blue.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name="mine", path="x")),
        (blue.adapters.DownloadAdapter, adapters_pb2.DownloadAdapterRequest(name="mine")),
        (blue.adapters.CreateAdapter, Create(name="copy", init_from="mine")),
        (blue.inference.Generate, inference_pb2.GenerateRequest(adapter="mine", prompts=[text_of("a")])),
        (blue.inference.Logprob, inference_pb2.LogprobRequest(adapter="mine", sequences=ONE)),
        (blue.inference.ReferenceLogprob, inference_pb2.ReferenceLogprobRequest(reference="mine", sequences=ONE)),
        (blue.inference.Reward, inference_pb2.RewardRequest(rewards=[{"adapter": "mine"}], sequences=ONE)),
        (blue.inference.Score, inference_pb2.ScoreRequest(ppo_adapter_name="mine", sequences=ONE)),
        (blue.sessions.OpenSession, Open(ppo_adapter_name="mine")),
        (blue.sessions.SetActiveAdapter, Activate(session_id=mine, ppo_adapter_name="mine")),
        (blue.training.ForwardBackward, training_pb2.ForwardBackwardRequest(session_id=mine, adapter="mine")),
        (blue.training.OptimStep, training_pb2.OptimStepRequest(session_id=mine, adapter="mine")),
    ]  # fmt: skip
    for method, request in calls:
        absent = type(request)()
        absent.CopyFrom(request)
        for field in ("name", "adapter", "reference", "ppo_adapter_name", "init_from"):
            if getattr(request, field, "") == "mine":
                setattr(absent, field, "none")
        if request.DESCRIPTOR.name == "RewardRequest":
            absent.rewards[0].adapter = "none"
        hidden = refused(method, request)
        assert code(hidden) == HIDDEN, method
        # Word for word what is said of one that nobody has.
        assert hidden.message.replace("mine", "none") == refused(method, absent).message
    assert "mine" not in names(blue)
    assert "mine" not in str(status(blue))
    assert names(red) == ["judge", "mine", "r1", "r2", "shared"]
    # And the name is free: that it is not would tell that somebody has it.
    blue.adapters.CreateAdapter(Create(name="mine"))
    assert "mine" in names(blue)
    blue.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="mine"))
    assert "mine" in names(red)


def test_tenants_train_adapters_of_the_same_name_apart(guarded):
    clients = [guarded.as_("red"), guarded.as_("blue")]
    for client in clients:
        client.adapters.CreateAdapter(Create(name="p", value_head=True))
    opened = [client.sessions.OpenSession(Open(ppo_adapter_name="p")) for client in clients]
    assert [list(one.leases) for one in opened] == [["p"], ["p"]]
    uids = {one.uid for one in guarded.on_loop(guarded.edge.registry.of_tenant, None) if one.name == "p"}
    assert len(uids) == 2
    assert (
        guarded.on_loop(guarded.edge.registry.find, "red/p").uid
        != guarded.on_loop(guarded.edge.registry.find, "blue/p").uid
    )


@pytest.mark.fault(26)
def test_another_tenants_session_is_not_there(guarded):
    red, blue = guarded.as_("red"), guarded.as_("blue")
    session = red.sessions.OpenSession(Open(label="secret plans")).session_id
    for method, request in (
        (blue.sessions.GetSession, Session(session_id=session)),
        (blue.sessions.KeepAlive, sessions_pb2.KeepAliveRequest(session_id=session)),
        (blue.sessions.CloseSession, sessions_pb2.CloseSessionRequest(session_id=session)),
        (blue.inference.Logprob, inference_pb2.LogprobRequest(session_id=session, adapter="base", sequences=ONE)),
        (blue.adapters.CreateAdapter, Create(session_id=session, name="x")),
    ):
        refusal = refused(method, request)
        assert code(refusal) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        assert "secret" not in refusal.message
    assert blue.sessions.OpenSession(Open(resume_session_id=session)).session_id != session
    assert red.sessions.GetSession(Session(session_id=session)).label == "secret plans"
    assert [one.label for one in status(blue).sessions] == [""]
    assert {one.label for one in status(red).sessions} == {"secret plans"}


def test_a_request_id_is_each_tenants_own(guarded):
    red, blue = guarded.as_("red"), guarded.as_("blue")
    red.adapters.CreateAdapter(Create(name="same", request_id="1"))
    assert blue.adapters.CreateAdapter(Create(name="same", request_id="1", value_head=True)).value_head


def test_what_the_operator_loaded_is_everybodys_to_read_and_nobody_elses_to_change(guarded):
    red = guarded.as_("red")
    red.inference.Reward(inference_pb2.RewardRequest(rewards=[{"adapter": "r1"}], sequences=ONE))
    red.inference.Logprob(inference_pb2.LogprobRequest(adapter="shared", sequences=ONE))
    load = adapters_pb2.LoadAdapterRequest
    owned = (grpc.StatusCode.PERMISSION_DENIED, "NOT_OWNER")
    assert code(refused(red.sessions.OpenSession, Open(ppo_adapter_name="shared"))) == owned
    assert code(refused(red.adapters.DeleteAdapter, adapters_pb2.DeleteAdapterRequest(name="r1"))) == owned
    session = red.sessions.OpenSession(Open()).session_id
    batch = training_pb2.OptimStepRequest(session_id=session, adapter="shared", adamw={"learning_rate": 1e-4})
    assert code(refused(red.training.OptimStep, batch)) == owned
    taken = refused(red.adapters.CreateAdapter, Create(name="shared"))
    assert taken.code is grpc.StatusCode.ALREADY_EXISTS
    with guarded_root(guarded) as path:
        (path / "red" / "mine").mkdir(parents=True)
        replacing = load(name="r1", kind=types_pb2.ADAPTER_KIND_REWARD, path="mine", replace=True)
        assert code(refused(red.adapters.LoadAdapter, replacing)) == owned
    # One whose token names it may, and the operator may.
    named = guarded.as_("red", adapters=("shared",))
    assert list(named.sessions.OpenSession(Open(ppo_adapter_name="shared")).leases) == ["shared"]
    guarded.as_("operator").adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="r2"))
    assert "r2" not in names(red)


class guarded_root:
    """Lets the server read a directory."""

    def __init__(self, live):
        self._live = live

    def __enter__(self):
        path = self._live.config.security.tokens.parent
        self._live.edge.disks.roots = Roots((path,))
        return path

    def __exit__(self, *_):
        self._live.edge.disks.roots = Roots(())


@pytest.mark.fault(26)
def test_a_token_that_names_adapters_means_no_others(guarded):
    whole = guarded.as_("red")
    for name in ("p1", "p2"):
        whole.adapters.CreateAdapter(Create(name=name))
    one = guarded.as_("red", Scope.GENERATE, Scope.REWARD, Scope.ADAPTERS, adapters=("p1",))
    assert names(one) == ["p1", "r1", "r2"]
    one.inference.Logprob(inference_pb2.LogprobRequest(adapter="p1", sequences=ONE))
    one.inference.Reward(inference_pb2.RewardRequest(rewards=[{"adapter": "r1"}], sequences=ONE))
    assert code(refused(one.inference.Logprob, inference_pb2.LogprobRequest(adapter="p2", sequences=ONE))) == HIDDEN
    made = refused(one.adapters.CreateAdapter, Create(name="p3"))
    assert code(made) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_OWNER")


def test_who_may_not_train_takes_no_lease_and_keeps_no_trainer_out(guarded):
    trainer, reader = guarded.as_("red"), guarded.as_("red", Scope.GENERATE, Scope.REWARD)
    trainer.adapters.CreateAdapter(Create(name="p", value_head=True))
    read = reader.sessions.OpenSession(Open(ppo_adapter_name="p"))
    assert (read.ppo_adapter_name, list(read.leases)) == ("p", [])
    assert list(trainer.sessions.OpenSession(Open(ppo_adapter_name="p")).leases) == ["p"]
    again = reader.sessions.OpenSession(Open(ppo_adapter_name="p"))
    reader.inference.Logprob(inference_pb2.LogprobRequest(session_id=again.session_id, sequences=ONE))


def test_the_holder_of_a_lease_is_no_name_to_other_tenants(guarded):
    red = guarded.as_("red", adapters=("shared",))
    red.sessions.OpenSession(Open(ppo_adapter_name="shared", label="secret plans"))
    refusal = refused(guarded.as_("blue", adapters=("shared",)).sessions.OpenSession, Open(ppo_adapter_name="shared"))
    assert refusal.reason == "ADAPTER_LEASED"
    assert "secret" not in refusal.message
    mine = refused(red.sessions.OpenSession, Open(ppo_adapter_name="shared"))
    assert "secret plans" in mine.message


def test_the_operator_sees_what_everybody_has(guarded):
    guarded.as_("red").adapters.CreateAdapter(Create(name="p"))
    guarded.as_("red").sessions.OpenSession(Open(label="red's"))
    seen = status(guarded.as_("operator"))
    assert [one.name for one in seen.adapters] == ["judge", "r1", "r2", "red/p", "shared"]
    assert [one.label for one in seen.sessions] == ["red's"]


# ---------------------------------------------------------------------------------------------------- audit


def lines(guarded):
    return [json.loads(line) for line in guarded.config.security.audit_log.read_text().splitlines()]


def test_each_change_and_each_refusal_is_a_line_and_reading_is_none(guarded):
    red = guarded.as_("red")
    red.adapters.CreateAdapter(Create(name="p", request_id="r-1"))
    red.inference.Logprob(inference_pb2.LogprobRequest(adapter="p", sequences=ONE))
    refused(red.inference.Logprob, inference_pb2.LogprobRequest(adapter="q", sequences=ONE))
    refused(guarded.server.GetStatus, server_pb2.GetStatusRequest())
    made, missing, nobody = lines(guarded)
    token = red.token.split("_")[1]
    assert (made["tenant"], made["token"], made["method"]) == (
        "red",
        token,
        "/onebase.v1.AdapterService/CreateAdapter",
    )
    assert (made["adapter"], made["request_id"], made["outcome"]) == ("p", "r-1", "OK")
    assert (missing["adapter"], missing["outcome"], missing["reason"]) == ("q", "NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert (nobody["tenant"], nobody["token"], nobody["outcome"]) == ("", "", "UNAUTHENTICATED")
    assert red.token not in guarded.config.security.audit_log.read_text()


def test_a_session_id_is_a_secret_to_the_audit_log_too(guarded):
    red = guarded.as_("red")
    red.adapters.CreateAdapter(Create(name="p"))
    session = red.sessions.OpenSession(Open(ppo_adapter_name="p")).session_id
    refused(red.training.OptimStep, training_pb2.OptimStepRequest(session_id=session, adapter="p"))
    red.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    text = guarded.config.security.audit_log.read_text()
    assert [line["method"].rpartition("/")[2] for line in lines(guarded)] == [
        "CreateAdapter",
        "OpenSession",
        "OptimStep",
        "CloseSession",
    ]
    assert session not in text


def test_a_renamed_log_is_begun_anew(guarded):
    path = guarded.config.security.audit_log
    red = guarded.as_("red")
    red.adapters.CreateAdapter(Create(name="p"))
    path.rename(path.with_suffix(".1"))
    red.adapters.CreateAdapter(Create(name="q"))
    assert [line["adapter"] for line in lines(guarded)] == ["q"]


def test_a_server_without_tokens_hides_nothing(live):
    assert [one.name for one in live.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters] == [
        "p1",
        "r1",
        "r2",
        "ref",
    ]


def test_work_stands_in_its_own_tenants_queues(guarded):
    for tenant in ("red", "blue"):
        client = guarded.as_(tenant)
        client.inference.Logprob(inference_pb2.LogprobRequest(adapter="base", sequences=ONE))
        session = client.sessions.OpenSession(Open()).session_id
        client.inference.Logprob(inference_pb2.LogprobRequest(session_id=session, adapter="base", sequences=ONE))
    jobs = guarded.worker.wait_submitted(ScoreJob, 4)
    assert [job.tenant for job in jobs] == ["red", "red", "blue", "blue"]
    assert [bool(job.session) for job in jobs] == [False, True, False, True]
