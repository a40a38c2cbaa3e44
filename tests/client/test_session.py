import gc
import threading
import time
import weakref

import grpc
import numpy as np
import pytest
from client.wire import Failure

from onebase.client import types as t
from onebase.client.client import connect
from onebase.client.codec import sessions as sessions_codec
from onebase.client.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from onebase.client.keepalive import KeepAlive
from onebase.v1 import types_pb2

ATTEND = sessions_codec.attend("f" * 32)
HELD = Failure(grpc.StatusCode.ABORTED, "policy_1 is leased", reason="LEASE_HELD", retry_after=0.001)
REFUSED = Failure(grpc.StatusCode.FAILED_PRECONDITION, "no value head")


@pytest.fixture
def session(client):
    with client.open_session("policy_1", label="test") as session:
        yield session


# ------------------------------------------------------------------------------------------- opening and closing


def test_a_session_is_opened_as_asked(server, client):
    session = client.open_session("policy_1", label="mine", ttl=30.0, resume="f" * 32)

    (request,) = server.requests["OpenSession"]
    assert (request.ppo_adapter_name, request.label, request.ttl_seconds) == ("policy_1", "mine", 30.0)
    assert request.resume_session_id == session.id == "f" * 32
    assert (session.label, session.ppo_adapter_name) == ("mine", "policy_1")
    assert "policy_1" in repr(session)


def test_leaving_the_block_closes_the_session_and_its_thread(server, client):
    with client.open_session("policy_1") as session:
        assert session._keepalive.running

    assert server.sessions == {}
    assert not session._keepalive.running
    session.close()
    assert len(server.requests["CloseSession"]) == 1


def test_closing_the_client_gives_the_leases_back(server):
    with connect(server.target) as client:
        first, second = client.open_session("policy_1"), client.open_session("policy_2")
        assert len(server.sessions) == 2

    assert server.sessions == {}
    assert not first._keepalive.running
    assert not second._keepalive.running


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE])
def test_closing_what_has_ended_or_cannot_be_reached_is_no_error(server, client, code):
    session = client.open_session("policy_1")
    server.fail("CloseSession", Failure(code))

    session.close()


def test_an_error_in_the_block_is_not_hidden_by_closing(server, client):
    def work():
        with client.open_session("policy_1"):
            server.fail("CloseSession", Failure(grpc.StatusCode.UNAVAILABLE))
            raise KeyError

    with pytest.raises(KeyError):
        work()


def test_a_held_lease_is_waited_for(server, client):
    server.fail("OpenSession", HELD, HELD, HELD)

    assert client.open_session("policy_1", wait=60).ppo_adapter_name == "policy_1"
    assert len(server.requests["OpenSession"]) == 4


def test_a_held_lease_is_told_at_once_without_wait(server, client):
    server.fail("OpenSession", HELD)

    with pytest.raises(AbortedError) as caught:
        client.open_session("policy_1")

    assert (caught.value.reason, caught.value.retry_after) == ("LEASE_HELD", 0.001)
    assert len(server.requests["OpenSession"]) == 1


def test_a_lease_that_stays_held_is_told_after_the_wait_with_a_last_look_at_its_end(server, client):
    server.fail("OpenSession", *[Failure(grpc.StatusCode.ABORTED, "leased", retry_after=3600)] * 3)

    with pytest.raises(AbortedError, match="leased"):
        client.open_session("policy_1", wait=0.05)

    assert len(server.requests["OpenSession"]) == 2


def test_an_abort_that_no_waiting_cures_is_told_at_once(server, client):
    server.fail("OpenSession", Failure(grpc.StatusCode.ABORTED, "other"))

    with pytest.raises(AbortedError, match="other"):
        client.open_session("policy_1", wait=60)


# ----------------------------------------------------------------------------------------------- staying alive


def test_a_session_is_kept_alive_three_times_per_ttl(server, client):
    session = client.open_session("policy_1", ttl=0.03)

    server.wait_for("KeepAlive", 3)

    assert {request.session_id for request in server.requests["KeepAlive"]} == {session.id}


def test_keeping_alive_survives_a_server_that_is_away(server, client):
    session = client.open_session("policy_1", ttl=0.03)
    server.fail("KeepAlive", *[Failure(grpc.StatusCode.UNAVAILABLE)] * 5, Failure(grpc.StatusCode.INTERNAL))

    server.wait_for("KeepAlive", 10)

    assert session._keepalive.running


def test_a_session_that_has_ended_is_not_kept_alive(server, client):
    session = client.open_session("policy_1", ttl=0.03)
    server.sessions.clear()

    session._keepalive._thread.join(60)

    assert not session._keepalive.running
    with pytest.raises(NotFoundError):
        session.refresh()


class Heart:
    def __init__(self):
        self.beaten = threading.Event()

    def beat(self):
        self.beaten.set()
        return True


def test_a_thread_does_not_keep_alive_what_was_forgotten(transport):
    heart = Heart()
    keepalive = KeepAlive(transport, ATTEND, heart.beat, 0.001)
    assert heart.beaten.wait(60)
    forgotten = weakref.ref(heart)

    del heart
    keepalive._thread.join(60)
    gc.collect()

    assert forgotten() is None
    assert not keepalive.running


# --------------------------------------------------------------------------------------------------- attending


def test_a_session_is_attended_until_it_is_closed_and_its_thread_ends(server, client):
    server.attends = True
    session = client.open_session("policy_1", ttl=0.03)
    server.wait_for("AttendSession", 1)
    time.sleep(0.1)
    assert session._keepalive.running
    assert {request.session_id for request in server.requests["AttendSession"]} == {session.id}
    assert not server.requests["KeepAlive"]

    session.close()

    assert not session._keepalive.running
    assert server.sessions == {}


def test_a_stream_that_breaks_is_opened_again(server, client):
    server.attends, server.cuts = True, 3
    server.fail("AttendSession", Failure(grpc.StatusCode.CANCELLED), Failure(grpc.StatusCode.INTERNAL))

    with client.open_session("policy_1", ttl=0.03) as session:
        server.wait_for("AttendSession", 6)
        assert session._keepalive.running


def test_a_session_that_ended_or_a_client_that_was_closed_is_attended_no_more(server, client):
    server.attends = True
    ended, other = client.open_session("policy_1"), client.open_session("policy_2")
    server.wait_for("AttendSession", 2)
    del server.sessions[ended.id]
    ended._keepalive._thread.join(60)
    assert not ended._keepalive.running
    assert other._keepalive.running

    client._transport.close()

    other._keepalive._thread.join(60)
    assert not other._keepalive.running


def test_a_forgotten_session_is_let_go(server, client):
    server.attends = True
    session = client.open_session("policy_1")
    server.wait_for("AttendSession", 1)
    keepalive = session._keepalive

    del session
    gc.collect()

    keepalive._thread.join(60)
    assert not keepalive.running


# -------------------------------------------------------------------------------------------- the active adapter


def test_the_active_adapter_follows_every_answer_that_tells_it(server, session):
    session.set_active("policy_2")
    assert session.ppo_adapter_name == "policy_2"

    session.reward(t.Sequence("p", "c"), ppo_adapter_name="policy_3")
    assert session.ppo_adapter_name == "policy_3"

    session.score(t.Sequence("p", "c"), ppo_adapter_name="policy_4")
    assert session.ppo_adapter_name == "policy_4"

    server.sessions[session.id].ppo_adapter_name = "policy_5"
    session.reward(t.Sequence("p", "c"))
    assert session.ppo_adapter_name == "policy_5"

    server.sessions[session.id].ppo_adapter_name = "policy_6"
    assert session.refresh().ppo_adapter_name == "policy_6"
    assert session.ppo_adapter_name == "policy_6"


def test_a_failed_call_that_named_an_adapter_leaves_no_doubt_which_is_active(server, session):
    server.fail("Score", Failure(grpc.StatusCode.FAILED_PRECONDITION, "no value head", after_the_work=True))

    with pytest.raises(FailedPreconditionError):
        session.score(t.Sequence("p", "c"), ppo_adapter_name="policy_2")

    assert session.ppo_adapter_name == server.sessions[session.id].ppo_adapter_name == "policy_2"


def test_a_failed_call_that_named_none_changes_nothing_and_asks_nothing(server, session):
    server.fail("Reward", REFUSED)

    with pytest.raises(FailedPreconditionError):
        session.reward(t.Sequence("p", "c"))

    assert session.ppo_adapter_name == "policy_1"
    assert not server.requests["GetSession"]


def test_a_failed_call_is_told_even_if_asking_fails_too(server, session):
    server.fail("Reward", REFUSED)
    server.fail("GetSession", Failure(grpc.StatusCode.INTERNAL))

    with pytest.raises(FailedPreconditionError):
        session.reward(t.Sequence("p", "c"), ppo_adapter_name="policy_2")


def test_an_unreachable_server_is_not_asked_again(server, session):
    server.fail("Reward", *[Failure(grpc.StatusCode.UNAVAILABLE)] * 10_000)

    with pytest.raises(UnavailableError):
        session.reward(t.Sequence("p", "c"), ppo_adapter_name="policy_2", timeout=0.1)

    assert not server.requests["GetSession"]


def test_a_refused_change_keeps_the_active_adapter(server, session):
    server.fail("SetActiveAdapter", HELD)

    with pytest.raises(AbortedError):
        session.set_active("policy_2")

    assert session.ppo_adapter_name == "policy_1"


# ------------------------------------------------------------------------------------------------------- calls


def test_every_call_of_a_session_names_it(server, session):
    row = t.TrainingSequence([1], [2], *[np.zeros(1, np.float32)] * 4)
    calls = {
        "Generate": lambda: session.generate("p"),
        "Logprob": lambda: session.logprob(t.Sequence("p", "c")),
        "ReferenceLogprob": lambda: session.reference_logprob(t.Sequence("p", "c")),
        "Reward": lambda: session.reward(t.Sequence("p", "c")),
        "Score": lambda: session.score(t.Sequence("p", "c")),
        "ForwardBackward": lambda: session.forward_backward(row),
        "OptimStep": lambda: session.optim_step(t.AdamW(1e-3)),
        "CreateAdapter": lambda: session.create_adapter("new"),
        "LoadAdapter": lambda: session.load_adapter("policy_1", "somewhere"),
        "SaveAdapter": lambda: session.save_adapter("there"),
        "CheckpointAdapter": lambda: session.checkpoint_adapter(),
        "DeleteAdapter": lambda: session.delete_adapter("new"),
    }

    for method, call in calls.items():
        call()
        assert server.requests[method][-1].session_id == session.id, method


def test_the_active_adapter_is_meant_where_none_is_named(server, session):
    session.create_adapter("policy_1")

    assert session.generate("p")[0].adapter.name == "policy_1"
    assert session.logprob(t.Sequence("p", "c"))[0].adapter.name == "policy_1"
    assert session.forward_backward([]).adapter.name == "policy_1"
    assert session.optim_step(t.AdamW(1e-3)).adapter == t.AdapterVersion("policy_1", 8)
    assert session.save_adapter("there").adapter.name == "policy_1"
    assert session.generate("p", adapter="base")[0].adapter.name == "base"


def test_adapters_are_made_loaded_saved_and_deleted(server, session, tmp_path):
    lora = t.LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj",))

    assert session.create_adapter("new", lora, value_head=False, seed=3).lora == lora
    assert session.load_adapter("old", tmp_path / "x", kind="reward", replace=True).source == str(tmp_path / "x")
    assert [adapter.name for adapter in session.adapters()] == ["new", "old"]
    assert session.save_adapter("there", name="new", with_optimizer=True) == t.SavedAdapter(
        "/adapters/there", t.AdapterVersion("new", 7), 1_501_000
    )
    session.delete_adapter("new")

    with pytest.raises(NotFoundError) as caught:
        session.adapter("new")
    assert (caught.value.reason, caught.value.field) == ("ADAPTER_NOT_FOUND", "name")
    assert (server.requests["CreateAdapter"][0].seed, server.requests["CreateAdapter"][0].value_head) == (3, False)
    assert server.requests["LoadAdapter"][0].replace
    assert server.requests["SaveAdapter"][0].with_optimizer


def test_a_clients_own_state_goes_with_a_step_or_a_checkpoint_and_comes_back(server, session):
    session.optim_step(t.AdamW(1e-3))
    assert not server.requests["OptimStep"][-1].HasField("client_state")
    session.optim_step(t.AdamW(1e-3), client_state=b"")
    assert server.requests["OptimStep"][-1].HasField("client_state")
    assert session.checkpoint_adapter(client_state=b"a") == t.AdapterVersion("policy_1", 7)
    assert session.client_state("policy_1") == t.ClientState(t.AdapterVersion("policy_1", 7), b"a")
    policy = session.policy()
    policy.optim_step(t.AdamW(1e-3), client_state=b"b")
    assert policy.client_state().data == b"b"
    assert policy.checkpoint().version == 7
    assert server.requests["CheckpointAdapter"][-1].request_id


# ------------------------------------------------------------------------------------------------------- policy


def test_a_policy_is_bound_to_its_name(server, session):
    session.create_adapter("policy_1")
    policy = session.policy()
    session.set_active("policy_2")

    assert policy.name == policy.facts().name == "policy_1"
    assert policy.generate("p")[0].adapter.name == "policy_1"
    assert policy.logprob(t.Sequence("p", "c"), entropy=True)[0].entropy.tolist() == [2.0]
    assert policy.forward_backward([], denominator=2.0).adapter.name == "policy_1"
    assert policy.optim_step(t.AdamW(1e-3), max_grad_norm=1.0).adapter.name == "policy_1"
    assert policy.save("there", overwrite=True).adapter.name == "policy_1"
    assert session.ppo_adapter_name == "policy_2"
    assert "policy_1" in repr(policy)


def test_scoring_a_policy_makes_it_the_active_one(session):
    (score,) = session.policy("policy_2").score(t.Sequence("p", "abc"), rewards={"x": -1.0, "y": 0.5})

    assert session.ppo_adapter_name == "policy_2"
    assert score.policy.name == "policy_2"
    assert (score.scores, score.reward) == ({"x": 3.0, "y": 103.0}, 48.5)


def test_there_is_no_policy_without_an_active_adapter(client):
    with client.open_session() as session, pytest.raises(ValueError, match="set_active"):
        session.policy()


# ------------------------------------------------------------------------------------------- what nobody leases


def test_a_client_reads_without_a_session(server, client):
    several = client.generate(
        ["ab", [1, 2]], adapter="a", sampling=t.SamplingParams(max_new_tokens=2, n=2), logprobs=True
    )

    assert [(c.prompt_index, c.completion_index, c.tokens.tolist()) for c in several] == [
        (0, 0, [0, 1]),
        (0, 1, [100, 101]),
        (1, 0, [1000, 1001]),
        (1, 1, [1100, 1101]),
    ]
    assert several[0].logprobs.tolist() == [0.0, -1.0]
    assert client.logprob(t.Sequence("p", "ab"), adapter="a")[0].completion_tokens.tolist() == [97, 98]
    assert client.reference_logprob(t.Sequence("p", "ab"))[0].logprobs.tolist() == [-3.0, -3.0]
    assert client.reward([t.Sequence("p", "ab")], ["x", "y"])[0].scores == {"x": 2.0, "y": 102.0}
    assert all(request.session_id == "" for request in server.requests["Generate"] + server.requests["Reward"])


def test_tokens_stream_one_by_one(client):
    with client.stream("abc", adapter="a", sampling=t.SamplingParams(max_new_tokens=3)) as stream:
        chunks = list(stream)

    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("a", None), ("b", None), ("c", "length")]


def test_an_adapter_without_a_shape_leaves_it_to_the_server_or_to_what_it_is_a_copy_of(server, client):
    client.create_adapter("p")
    client.create_adapter("c", kind="critic", init_from="r")
    client.create_adapter("q", t.LoraSpec(rank=3))

    plain, copied, shaped = server.requests["CreateAdapter"]
    assert (plain.HasField("lora"), plain.kind, plain.init_from) == (False, types_pb2.ADAPTER_KIND_POLICY, "")
    assert (copied.HasField("lora"), copied.kind, copied.init_from) == (False, types_pb2.ADAPTER_KIND_CRITIC, "r")
    assert shaped.lora.rank == 3


def test_a_client_manages_adapters_that_nobody_leases(server, client):
    client.create_adapter("p")
    client.load_adapter("r", "there", kind="reward")

    assert [adapter.name for adapter in client.adapters()] == ["p", "r"]
    assert [adapter.name for adapter in client.adapters("reward")] == ["r"]
    assert client.save_adapter("p", "out").path == "/adapters/out"
    client.delete_adapter("p")
    assert [adapter.name for adapter in client.adapters()] == ["r"]
    with pytest.raises(ValueError, match="kind must be one of"):
        client.adapters("judge")


def test_a_refusal_names_the_field(server, client):
    server.fail("Reward", Failure(grpc.StatusCode.INVALID_ARGUMENT, "empty", "EMPTY", "sequences[0].completion"))

    with pytest.raises(InvalidArgumentError) as caught:
        client.reward(t.Sequence("p", ""))

    assert (caught.value.reason, caught.value.field) == ("EMPTY", "sequences[0].completion")
    assert caught.value.method == "InferenceService/Reward"
