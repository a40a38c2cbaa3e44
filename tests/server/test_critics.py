"""Critics: made, loaded, leased and trained like policies, and asked for values by Score alone."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from server.conftest import furnish
from server.fakes import logprobs, values
from server.harness import Live, array, floats, pair, refused

from onebase.server.config import EngineConfig, ServerConfig
from onebase.server.jobs import AdapterKind, CreateAdapterJob
from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2, types_pb2

A, S = adapters_pb2, inference_pb2
CRITIC, REWARD, REFERENCE = (
    types_pb2.ADAPTER_KIND_CRITIC,
    types_pb2.ADAPTER_KIND_REWARD,
    types_pb2.ADAPTER_KIND_REFERENCE,
)
ONE = [pair((9,), (7,))]


@pytest.fixture
def live(tmp_path):
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, roots=(tmp_path,))
    with Live(config) as server:
        furnish(server)
        yield server


def make(live, name="c1", session="", **more):
    return live.adapters.CreateAdapter(
        A.CreateAdapterRequest(name=name, session_id=session, **{"kind": CRITIC, **more})
    )


def open_session(live, name=""):
    return live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name=name)).session_id


def step(live, session, name, **more):
    request = training_pb2.OptimStepRequest(session_id=session, adapter=name, adamw={"learning_rate": 0.1}, **more)
    return live.training.OptimStep(request)


def train(live, session, name):
    one = floats(0.0)
    sequence = training_pb2.TrainingSequence(
        sequence=pair((9,), (7,)), old_logprobs=one, old_values=one, advantages=one, returns=one
    )
    return live.training.ForwardBackward(
        training_pb2.ForwardBackwardRequest(
            session_id=session, adapter=name, sequences=[sequence], ppo=training_pb2.PpoLoss()
        )
    )


# ------------------------------------------------------------------------------------------------------- making


def test_a_critic_always_has_a_value_head_and_its_session_the_lease(live, session):
    made = make(live, session=session)
    assert (made.kind, made.value_head, made.leased) == (CRITIC, True, True)
    assert (live.worker.executed[-1].kind, live.worker.executed[-1].init_from) == (AdapterKind.CRITIC, None)
    now = live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session))
    assert (list(now.leases), now.ppo_adapter_name) == (["p1", "c1"], "p1")


@pytest.mark.parametrize("source", ["r1", "p1", "ref"])
def test_an_adapter_begins_as_a_copy_of_any_other(live, source):
    for kind, value_head in ((CRITIC, True), (0, False), (types_pb2.ADAPTER_KIND_POLICY, True)):
        made = make(live, f"new{kind}", init_from=source, kind=kind, value_head=value_head, seed=4)
        job = live.worker.executed[-1]
        assert isinstance(job, CreateAdapterJob)
        assert (job.init_from, job.value_head, job.seed) == (live.uid(source), value_head, 4)
        assert made.kind == (kind or types_pb2.ADAPTER_KIND_POLICY)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        ({"kind": REWARD}, "OUT_OF_RANGE", "kind"),
        ({"kind": REFERENCE}, "OUT_OF_RANGE", "kind"),
        ({"kind": 9}, "OUT_OF_RANGE", "kind"),
        ({"init_from": "base"}, "OUT_OF_RANGE", "init_from"),
        ({"init_from": "r9"}, "ADAPTER_NOT_FOUND", "init_from"),
        ({"init_from": "no name"}, "BAD_ADAPTER_NAME", "init_from"),
        ({"init_from": "r1", "lora": {"rank": 4, "alpha": 1, "target_modules": ["q"]}}, "UNUSED_FIELD", "lora"),
    ],
)
def test_what_cannot_be_made_is_refused_by_its_field(live, request_, reason, field):
    refusal = refused(make, live, **request_)
    assert (refusal.reason, refusal.field) == (reason, field)
    make(live)  # the refused call reserved nothing


def test_a_critic_is_loaded_and_replaced_by_its_holder_alone(live, session):
    request = A.LoadAdapterRequest(session_id=session, name="c1", kind=CRITIC, path="one", value_head=True)
    loaded = live.adapters.LoadAdapter(request)
    assert (loaded.kind, loaded.value_head, loaded.leased) == (CRITIC, True, True)
    request.replace = True
    other = A.LoadAdapterRequest(session_id=open_session(live), name="c1", kind=CRITIC, path="one", replace=True)
    assert refused(live.adapters.LoadAdapter, other).reason == "NOT_LEASE_HOLDER"
    assert live.adapters.LoadAdapter(request).version == 1
    assert refused(live.adapters.DeleteAdapter, A.DeleteAdapterRequest(name="c1")).reason == "NOT_LEASE_HOLDER"


# ----------------------------------------------------------------------------------------------------- training


def test_a_critic_is_trained_beside_its_policy_by_the_holder_of_its_lease(live, session):
    make(live, session=session)
    assert train(live, session, "c1").adapter.name == "c1"
    assert step(live, session, "c1").adapter.version == 1
    assert live.adapters.GetAdapter(A.GetAdapterRequest(name="p1")).version == 0
    other = open_session(live)
    for call in (train, step):
        assert refused(call, live, other, "c1").reason == "NOT_LEASE_HOLDER"


def test_a_free_critics_lease_comes_with_training_it(live):
    make(live)  # nobody's, as after a restart
    session, other = open_session(live, "p1"), open_session(live)
    train(live, session, "c1")
    now = live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session))
    assert (list(now.leases), now.ppo_adapter_name) == (["p1", "c1"], "p1")
    assert refused(train, live, other, "c1").reason == "NOT_LEASE_HOLDER"
    live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    train(live, other, "c1")
    assert live.adapters.GetAdapter(A.GetAdapterRequest(name="c1")).pending_gradients == 1  # the others were dropped


@pytest.mark.parametrize("name", ["r1", "ref", "base"])
def test_what_is_frozen_is_not_trained(live, session, name):
    for call in (train, step):
        refusal = refused(call, live, session, name)
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "WRONG_ADAPTER_KIND",
            "adapter",
        )
        assert "name a policy or a critic adapter" in refusal.message


# ------------------------------------------------------------------------------------------------------ reading


def test_score_takes_the_values_from_a_named_critic(live, session):
    make(live, session=session)
    train(live, session, "c1")
    step(live, session, "c1")
    policy, critic = live.uid("p1"), live.uid("c1")
    row = np.array([9, 8, 7, 6])
    request = S.ScoreRequest(session_id=session, critic="c1", sequences=[pair((9, 8), (7, 6))], outputs=[1, 2, 3])
    response = live.inference.Score(request)
    (result,) = response.results
    np.testing.assert_array_equal(array(result.values), values(critic, row, 2))
    np.testing.assert_array_equal(array(result.logprobs), logprobs(policy, row, 2))
    np.testing.assert_array_equal(array(result.reference_logprobs), logprobs(0, row, 2))
    assert (response.critic.name, response.critic.version, response.policy.version) == ("c1", 1, 0)
    assert response.ppo_adapter_name == "p1"
    assert [row.adapter for row in live.worker.executed[-1].rows] == [policy, 0, critic]
    assert not live.worker.executed[-1].rows[0].values


def test_a_critic_spares_the_policy_its_value_head_and_with_values_alone_its_row(live):
    live.adapters.CreateAdapter(A.CreateAdapterRequest(name="headless"))
    make(live)
    request = S.ScoreRequest(ppo_adapter_name="headless", sequences=ONE, outputs=[3])
    refusal = refused(live.inference.Score, request)
    assert (refusal.reason, refusal.field) == ("NO_VALUE_HEAD", "outputs")
    assert "name a critic" in refusal.message
    request.critic = "c1"
    response = live.inference.Score(request)
    assert [row.adapter for row in live.worker.executed[-1].rows] == [live.uid("c1")]
    assert (response.policy.name, response.HasField("critic")) == ("headless", True)
    request.adapter_version = 0
    assert refused(live.inference.Score, request).reason == "UNUSED_FIELD"


@pytest.mark.parametrize(
    ("critic", "reason", "code"),
    [
        ("p1", "WRONG_ADAPTER_KIND", grpc.StatusCode.FAILED_PRECONDITION),
        ("r1", "WRONG_ADAPTER_KIND", grpc.StatusCode.FAILED_PRECONDITION),
        ("base", "WRONG_ADAPTER_KIND", grpc.StatusCode.FAILED_PRECONDITION),
        ("c9", "ADAPTER_NOT_FOUND", grpc.StatusCode.NOT_FOUND),
    ],
)
def test_only_a_critic_is_a_critic(live, critic, reason, code):
    make(live)
    refusal = refused(
        live.inference.Score, S.ScoreRequest(ppo_adapter_name="p1", critic=critic, sequences=ONE, outputs=[3])
    )
    assert (refusal.code, refusal.reason, refusal.field) == (code, reason, "critic")


def test_a_critic_without_values_is_refused(live):
    make(live)
    request = S.ScoreRequest(ppo_adapter_name="p1", critic="c1", sequences=ONE, outputs=[1])
    refusal = refused(live.inference.Score, request)
    assert (refusal.reason, refusal.field) == ("UNUSED_FIELD", "critic")


def test_a_critic_does_nothing_else(live, session):
    make(live, session=session)
    sampling = S.SamplingParams(max_new_tokens=1)
    asked = [
        (live.inference.Generate, S.GenerateRequest(adapter="c1", prompts=[ONE[0].prompt], sampling=sampling)),
        (live.inference.Logprob, S.LogprobRequest(adapter="c1", sequences=ONE)),
        (live.inference.ReferenceLogprob, S.ReferenceLogprobRequest(reference="c1", sequences=ONE)),
        (live.inference.Reward, S.RewardRequest(rewards=[{"adapter": "c1"}], sequences=ONE)),
        (live.inference.Score, S.ScoreRequest(ppo_adapter_name="c1", sequences=ONE, outputs=[1])),
        (
            live.sessions.SetActiveAdapter,
            sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name="c1"),
        ),
        (live.sessions.OpenSession, sessions_pb2.OpenSessionRequest(ppo_adapter_name="c1")),
    ]
    for call, request in asked:
        refusal = refused(call, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_ADAPTER_KIND")
        assert "'c1', which is a critic adapter" in refusal.message
