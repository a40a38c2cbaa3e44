"""A session's active adapter is its own, and is what its last valid word said: after every call, error and cancel."""

from __future__ import annotations

import grpc
import pytest
from server.harness import pair, refused

from onebase.server.errors import ResourceExhausted
from onebase.server.jobs import ScoreJob
from onebase.v1 import adapters_pb2, inference_pb2, inference_pb2_grpc, sessions_pb2

ONE = [pair((9,), (7,))]
BAD = [pair((9,), (1000,))]


@pytest.fixture(autouse=True)
def second_policy(live):
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="p2", value_head=True))


@pytest.fixture
def other(live):
    """Another session, on p2, whose active adapter nobody else may touch."""
    request = sessions_pb2.OpenSessionRequest(ppo_adapter_name="p2", label="other")
    session = live.sessions.OpenSession(request).session_id
    yield session
    assert active(live, session) == "p2"


def active(live, session):
    return live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)).ppo_adapter_name


def score(session, name, sequences=ONE):
    return inference_pb2.ScoreRequest(
        session_id=session, ppo_adapter_name=name, rewards=[{"adapter": "r1"}], sequences=sequences
    )


def reward(session, name, sequences=ONE):
    return inference_pb2.RewardRequest(
        session_id=session, ppo_adapter_name=name, rewards=[{"adapter": "r1"}], sequences=sequences
    )


CALLS = [("Score", score), ("Reward", reward)]


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_it_is_the_named_one_from_then_on_without_its_lease(live, session, other, method, request_):
    response = getattr(live.inference, method)(request_(session, "p2"))
    assert response.ppo_adapter_name == "p2"
    assert active(live, session) == "p2"
    logprob = live.inference.Logprob(inference_pb2.LogprobRequest(session_id=session, sequences=ONE))
    assert logprob.adapter.name == "p2"
    leases = live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)).leases
    assert list(leases) == ["p1"]


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_an_empty_name_leaves_it(live, session, other, method, request_):
    assert getattr(live.inference, method)(request_(session, "")).ppo_adapter_name == "p1"
    assert active(live, session) == "p1"


@pytest.mark.parametrize(("method", "request_"), CALLS)
@pytest.mark.parametrize("name", ["nobody", "r1", "ref", "base", "../p2"])
def test_an_invalid_name_changes_nothing(live, session, other, method, request_, name):
    refusal = refused(getattr(live.inference, method), request_(session, name))
    assert refusal.field == "ppo_adapter_name"
    assert active(live, session) == "p1"


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_it_stays_after_an_invalid_request(live, session, other, method, request_):
    refusal = refused(getattr(live.inference, method), request_(session, "p2", BAD))
    assert refusal.reason == "BAD_TOKEN_ID"
    assert active(live, session) == "p2"


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_it_stays_after_an_error_of_the_engine(live, session, other, method, request_):
    live.worker.failures.append(ResourceExhausted("OUT_OF_MEMORY", "too much"))
    assert refused(getattr(live.inference, method), request_(session, "p2")).reason == "OUT_OF_MEMORY"
    assert active(live, session) == "p2"


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_it_stays_after_a_full_queue(live, session, other, method, request_):
    live.worker.room = 0
    assert refused(getattr(live.inference, method), request_(session, "p2")).reason == "QUEUE_FULL"
    assert active(live, session) == "p2"


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_it_stays_after_a_cancel(live, session, other, method, request_):
    live.worker.hold(ScoreJob)
    future = getattr(live.inference, method).future(request_(session, "p2"))
    (job,) = live.worker.wait_submitted(ScoreJob)
    assert active(live, session) == "p2"  # from before the work on
    future.cancel()
    live.worker.wait_done(job)
    assert active(live, session) == "p2"


@pytest.mark.parametrize(("method", "request_"), CALLS)
def test_it_stays_after_a_deadline(live, session, other, method, request_):
    live.worker.hold(ScoreJob)
    refusal = refused(getattr(live.inference, method), request_(session, "p2"), timeout=0.2)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert active(live, session) == "p2"


def test_it_stays_after_a_lost_connection(live, session, other):
    live.worker.hold(ScoreJob)
    channel = grpc.insecure_channel(f"127.0.0.1:{live.port}", options=[("grpc.use_local_subchannel_pool", 1)])
    future = inference_pb2_grpc.InferenceServiceStub(channel).Score.future(score(session, "p2"))
    (job,) = live.worker.wait_submitted(ScoreJob)
    channel.close()
    live.worker.wait_done(job)
    assert future.done()
    assert active(live, session) == "p2"


def test_without_a_session_a_reward_has_nowhere_to_keep_it(live):
    refusal = refused(live.inference.Reward, reward("", "p1"))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "session_id")


def test_a_new_policy_of_a_deleted_ones_name_is_the_active_one_again(live, session):
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=session, name="p1"))
    request = inference_pb2.LogprobRequest(session_id=session, sequences=ONE)
    refusal = refused(live.inference.Logprob, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=session, name="p1"))
    assert live.inference.Logprob(request).adapter.name == "p1"
