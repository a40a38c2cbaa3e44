"""Calls that mean an adapter which is replaced or deleted while they wait: a name means something all the time."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from server.conftest import furnish
from server.fakes import logprobs
from server.harness import Live, pair, refusal_of, tokens_of

from onebase.server import jobs
from onebase.server.config import EngineConfig, ServerConfig
from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, types_pb2

KINDS = {
    "p1": types_pb2.ADAPTER_KIND_POLICY,
    "r1": types_pb2.ADAPTER_KIND_REWARD,
    "ref": types_pb2.ADAPTER_KIND_REFERENCE,
}
SEQUENCES = [pair((9, 8), (7, 6, 5))]
CALLS = {
    "Logprob": ("inference", inference_pb2.LogprobRequest(adapter="p1", sequences=SEQUENCES), "p1", jobs.ScoreJob),
    "ReferenceLogprob": (
        "inference",
        inference_pb2.ReferenceLogprobRequest(reference="ref", sequences=SEQUENCES),
        "ref",
        jobs.ScoreJob,
    ),
    "Reward": (
        "inference",
        inference_pb2.RewardRequest(rewards=[{"adapter": "r1"}], sequences=SEQUENCES),
        "r1",
        jobs.ScoreJob,
    ),
    "Score": (
        "inference",
        inference_pb2.ScoreRequest(ppo_adapter_name="p1", rewards=[{"adapter": "r1"}], sequences=SEQUENCES),
        "r1",
        jobs.ScoreJob,
    ),
    "Generate": (
        "inference",
        inference_pb2.GenerateRequest(adapter="p1", prompts=[tokens_of(1)], sampling={"max_new_tokens": 3}),
        "p1",
        jobs.GenerateJob,
    ),
    "CreateAdapter": (
        "adapters",
        adapters_pb2.CreateAdapterRequest(name="copy", init_from="p1"),
        "p1",
        jobs.CreateAdapterJob,
    ),
    "SaveAdapter": ("adapters", adapters_pb2.SaveAdapterRequest(name="p1", path="saved"), "p1", jobs.SaveAdapterJob),
    "DownloadAdapter": ("adapters", adapters_pb2.DownloadAdapterRequest(name="p1"), "p1", jobs.SaveAdapterJob),
    "GetClientState": ("adapters", adapters_pb2.GetClientStateRequest(name="p1"), "p1", jobs.ClientStateJob),
}


@pytest.fixture
def live(tmp_path):
    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, roots=(tmp_path,))
    with Live(config) as server:
        furnish(server)
        yield server


@pytest.fixture
def session(live):
    return live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="p1")).session_id


def begun(live, method):
    """The call, waiting in the worker for an adapter that will not be there when its turn comes; and what gives it."""
    service, request, name, job = CALLS[method]
    live.worker.hold(job)
    stub = getattr(getattr(live, service), method)
    call = stub.future(request) if hasattr(stub, "future") else stub(request)
    live.worker.wait_submitted(job, 2 if job is jobs.CreateAdapterJob else 1)

    def outcome():
        return list(call) if not hasattr(stub, "future") else call.result(timeout=20)

    return name, outcome


@pytest.mark.parametrize("method", CALLS)
def test_a_call_whose_adapter_is_replaced_means_the_new_one(live, session, method):
    name, outcome = begun(live, method)
    old = live.uid(name)
    request = adapters_pb2.LoadAdapterRequest(session_id=session, name=name, path="x", kind=KINDS[name], replace=True)
    live.adapters.LoadAdapter(request)
    live.worker.wait_done(live.worker.wait_submitted(jobs.DeleteAdapterJob)[0])
    assert old not in live.worker.adapters
    live.worker.release()
    answer = outcome()
    new = live.uid(name)
    assert new != old
    asked = [job for job in live.worker.submitted if isinstance(job, CALLS[method][3])][-2:]
    assert [(old in jobs.adapters_of(job), new in jobs.adapters_of(job)) for job in asked] == [
        (True, False),
        (False, True),
    ]
    if method == "Logprob":
        found = np.frombuffer(answer.results[0].logprobs.data, "<f4")
        np.testing.assert_array_equal(found, logprobs(new, np.array([9, 8, 7, 6, 5]), 2))


@pytest.mark.parametrize("method", ["Logprob", "Generate", "SaveAdapter"])
def test_a_call_whose_adapter_is_deleted_is_told_what_there_is(live, session, method):
    name, outcome = begun(live, method)
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=session, name=name))
    live.worker.wait_done(live.worker.wait_submitted(jobs.DeleteAdapterJob)[0])
    live.worker.release()
    with pytest.raises(grpc.RpcError) as told:
        outcome()
    refusal = refusal_of(told.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert refusal.message.startswith(f"there is no adapter {name!r}")
    assert refusal.field
