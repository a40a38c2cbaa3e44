import threading

import grpc
import pytest
from client.fakes import FakeServer
from client.wire import Failure

from onebase.client.client import Client, connect
from onebase.client.codec import server as server_codec
from onebase.client.errors import (
    AbortedError,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from onebase.client.retry import Backoff
from onebase.client.transport import Transport
from onebase.client.types import AdamW, SamplingParams, Sequence

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "draining")
TWO_TOKENS = SamplingParams(max_new_tokens=2)


def test_a_read_is_repeated_until_the_server_is_back(server, client):
    server.fail("Reward", UNAVAILABLE, UNAVAILABLE)

    assert client.reward(Sequence("p", "abc"))[0].score == 3.0
    assert len(server.requests["Reward"]) == 3


def test_a_change_is_repeated_under_the_same_id_and_made_once(server, client):
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "connection lost", after_the_work=True)
    session = client.open_session("policy_1")
    server.fail("ForwardBackward", lost, UNAVAILABLE)
    server.fail("OptimStep", lost)

    assert session.forward_backward([]).pending_gradients == 1
    assert session.optim_step(AdamW(1e-3)).gradients_applied == 1

    passes = [request.request_id for request in server.requests["ForwardBackward"]]
    steps = [request.request_id for request in server.requests["OptimStep"]]
    assert (len(passes), len(set(passes)), len(steps), len(set(steps))) == (3, 1, 2, 1)
    assert passes[0] != steps[0]


def test_two_calls_have_two_ids(server, client):
    session = client.open_session("policy_1")

    session.forward_backward([])
    session.forward_backward([])

    first, second = server.requests["ForwardBackward"]
    assert first.request_id != second.request_id


def test_a_session_is_opened_once_and_set_whatever_is_lost(server, client):
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "connection lost", after_the_work=True)
    server.fail("OpenSession", lost, UNAVAILABLE)
    server.fail("SetActiveAdapter", lost, UNAVAILABLE)

    session = client.open_session("policy_1")
    session.set_active("policy_2")

    assert (list(server.sessions), session.ppo_adapter_name) == ([session.id], "policy_2")
    opened = [request.request_id for request in server.requests["OpenSession"]]
    assert (len(opened), len(set(opened)), len(server.requests["SetActiveAdapter"])) == (3, 1, 3)
    assert client.open_session().id != session.id


def test_a_close_is_sent_once(server, client):
    session = client.open_session("policy_1")
    server.fail("CloseSession", UNAVAILABLE)

    session.close()

    assert len(server.requests["CloseSession"]) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_other_codes_are_told_at_once(server, client, code):
    server.fail("Logprob", Failure(code, reason="NO"))

    with pytest.raises((AbortedError, InternalError)) as caught:
        client.logprob(Sequence("p", "c"), adapter="base")

    assert (caught.value.reason, caught.value.method) == ("NO", "InferenceService/Logprob")
    assert len(server.requests["Logprob"]) == 1


def test_a_full_queue_is_waited_for(server, client):
    server.fail("Reward", Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after=0.001))

    assert client.reward(Sequence("p", "ab"))[0].score == 2.0


def test_a_full_queue_is_not_waited_for_beyond_the_deadline(server, client):
    server.fail("Reward", Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after=3600))

    with pytest.raises(ResourceExhaustedError) as caught:
        client.reward(Sequence("p", "ab"), timeout=50)

    assert caught.value.retry_after == 3600
    assert len(server.requests["Reward"]) == 1


def test_a_server_that_stays_away_is_told_as_what_it_is_and_not_as_a_deadline(server, client):
    server.fail("GetStatus", *[UNAVAILABLE] * 10_000)

    with pytest.raises(UnavailableError, match="draining"):
        client.status(timeout=1.0)

    assert len(server.requests["GetStatus"]) > 1


def test_a_last_attempt_that_the_deadline_cuts_short_does_not_hide_why_it_was_made(server, client):
    server.fail("Reward", UNAVAILABLE, Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    with pytest.raises(UnavailableError, match="draining"):
        client.reward(Sequence("p", "c"))

    assert len(server.requests["Reward"]) == 2


def test_a_call_that_is_not_answered_ends_at_its_deadline(server, client):
    server.hold = threading.Event()

    with pytest.raises(DeadlineExceededError, match="Generate was not answered within its timeout"):
        client.generate("ab", adapter="base", sampling=SamplingParams(max_new_tokens=2, n=2), timeout=0.2)


def test_a_message_beyond_the_limit_is_refused_here(server, client):
    with pytest.raises(ResourceExhaustedError):
        client.reward(Sequence("p", "x" * (65 * 1024 * 1024)))

    assert not server.requests["Reward"]


def test_a_large_message_passes_both_ways(client):
    text = "x" * (5 * 1024 * 1024)

    (result,) = client.logprob(Sequence("p", text), adapter="base")

    assert result.logprobs.shape == result.completion_tokens.shape == (len(text),)


# ----------------------------------------------------------------------------------------------------- streams


def test_a_stream_that_fails_before_its_first_message_begins_again(server, client):
    server.fail("Generate", UNAVAILABLE, UNAVAILABLE)

    assert client.generate("ab", adapter="base", sampling=TWO_TOKENS)[0].text == "ab"
    assert len(server.requests["Generate"]) == 3


def test_a_stream_that_has_begun_is_not_repeated(server, client):
    server.hold = threading.Event()
    stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
    assert next(stream).text == "a"

    server.grpc_server.stop(0).wait()

    with pytest.raises((UnavailableError, CancelledError)):
        next(stream)
    assert len(server.requests["Generate"]) == 1


def test_what_is_read_as_a_whole_begins_anew_when_its_stream_is_cut(server, client):
    server.cuts = 2

    assert client.generate("ab", adapter="base", sampling=TWO_TOKENS)[0].text == "ab"
    assert len(server.requests["Generate"]) == 3
    assert server.requests["Generate"][0] == server.requests["Generate"][2]


def test_closing_a_stream_cancels_the_call(server, client):
    server.hold = threading.Event()
    stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
    assert next(stream).text == "a"

    stream.close()

    assert server.cancelled.wait(60)
    assert list(stream) == []
    stream.close()


def test_leaving_the_block_of_a_stream_cancels_the_call(server, client):
    server.hold = threading.Event()

    with client.stream("ab", adapter="base", sampling=TWO_TOKENS) as stream:
        next(stream)

    assert server.cancelled.wait(60)


def test_a_stream_that_is_dropped_cancels_the_call(server, client):
    server.hold = threading.Event()

    for chunk in client.stream("ab", adapter="base", sampling=TWO_TOKENS):
        assert chunk.text == "a"
        break

    assert server.cancelled.wait(60)


def test_another_thread_can_close_a_stream_that_waits(server, client):
    server.hold = threading.Event()
    stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
    next(stream)
    rest = []
    reader = threading.Thread(target=lambda: rest.extend(stream))
    reader.start()

    stream.close()
    reader.join(60)

    assert not reader.is_alive()
    assert rest == []


# --------------------------------------------------------------------------------------- opening and closing


def test_connecting_waits_for_a_server_that_comes_up_later():
    first = FakeServer().start()
    first.stop()
    later = FakeServer()
    timer = threading.Timer(0.3, lambda: later.start(first.port))
    timer.start()

    with connect(first.target, wait=60) as client:
        assert client.info().version == "9.9"

    timer.join()
    later.stop()


def test_connecting_in_vain_names_the_address_and_the_command():
    server = FakeServer().start()
    server.stop()

    with pytest.raises(UnavailableError) as caught:
        connect(server.target, wait=0)

    assert server.target in str(caught.value)
    assert "onebase serve" in str(caught.value)
    assert "refused" in str(caught.value)


def test_a_target_without_a_port_is_refused():
    with pytest.raises(ValueError, match=r"target 'localhost' has no port; .* such as 127\.0\.0\.1:7070"):
        connect("localhost")


def test_a_closed_client_says_so(server):
    client = connect(server.target)
    client.close()
    client.close()

    with pytest.raises(CancelledError, match="closed"):
        client.info()
    with pytest.raises(CancelledError, match="closed"):
        client.stream("ab", adapter="base")


def test_closing_ends_a_call_that_waits_for_its_retry(server):
    transport = Transport(server.target, timeout=600, backoff=Backoff(first=500, longest=500))
    server.fail("GetServerInfo", UNAVAILABLE)
    failures = []

    def ask():
        try:
            transport.run(server_codec.info())
        except CancelledError as error:
            failures.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    server.wait_for("GetServerInfo", 1)
    transport.close()
    asker.join(60)

    assert [error.reason for error in failures] in (["CLIENT_CLOSED"], [""])


def test_many_threads_share_one_client(client):
    answers = {}

    def ask(size):
        answers[size] = [client.reward(Sequence("p", "x" * size))[0].score for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(size,)) for size in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == {size: [float(size)] * 5 for size in range(1, 9)}


def test_a_client_shows_where_it_is_connected(server, client):
    assert isinstance(client, Client)
    assert server.target in repr(client)
