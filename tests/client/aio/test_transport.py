import asyncio
import subprocess
import sys
import threading
import time

import grpc
import pytest
from client.aio.opened import arrived, cancelled, opened
from client.fakes import FakeServer
from client.wire import Failure

from onebase.client.aio import connect
from onebase.client.aio.transport import Transport
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
from onebase.client.types import AdamW, SamplingParams, Sequence

UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "draining")
TWO_TOKENS = SamplingParams(max_new_tokens=2)


async def test_a_read_is_repeated_until_the_server_is_back(server):
    server.fail("Reward", UNAVAILABLE, UNAVAILABLE)

    async with opened(server) as client:
        assert (await client.reward(Sequence("p", "abc")))[0].score == 3.0

    assert len(server.requests["Reward"]) == 3


async def test_a_change_is_repeated_under_the_same_id_and_made_once(server):
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "connection lost", after_the_work=True)
    async with opened(server) as client, client.open_session("policy_1") as session:
        server.fail("ForwardBackward", lost, UNAVAILABLE)
        server.fail("OptimStep", lost)

        assert (await session.forward_backward([])).pending_gradients == 1
        assert (await session.optim_step(AdamW(1e-3))).gradients_applied == 1

    passes = [request.request_id for request in server.requests["ForwardBackward"]]
    steps = [request.request_id for request in server.requests["OptimStep"]]
    assert (len(passes), len(set(passes)), len(steps), len(set(steps))) == (3, 1, 2, 1)


async def test_a_session_is_opened_once_and_set_whatever_is_lost(server):
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "connection lost", after_the_work=True)
    server.fail("OpenSession", lost, UNAVAILABLE)
    server.fail("SetActiveAdapter", lost, UNAVAILABLE)

    async with opened(server) as client, client.open_session("policy_1") as session:
        await session.set_active("policy_2")

        assert (list(server.sessions), session.ppo_adapter_name) == ([session.id], "policy_2")
        requests = [request.request_id for request in server.requests["OpenSession"]]
        assert (len(requests), len(set(requests)), len(server.requests["SetActiveAdapter"])) == (3, 1, 3)
        assert (await client.open_session()).id != session.id


async def test_a_close_is_sent_once(server):
    async with opened(server) as client:
        session = await client.open_session("policy_1")
        server.fail("CloseSession", UNAVAILABLE)

        await session.close()

    assert len(server.requests["CloseSession"]) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def test_other_codes_are_told_at_once_with_their_details(server, code):
    server.fail("Logprob", Failure(code, reason="NO", field="sequences[0]"))

    async with opened(server) as client:
        with pytest.raises((AbortedError, InternalError)) as caught:
            await client.logprob(Sequence("p", "c"), adapter="base")

    assert (caught.value.reason, caught.value.field) == ("NO", "sequences[0]")
    assert caught.value.method == "InferenceService/Logprob"
    assert len(server.requests["Logprob"]) == 1


async def test_a_full_queue_is_waited_for_but_not_beyond_the_deadline(server):
    server.fail("Reward", Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after=0.001))
    server.fail("Score", Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after=3600))

    async with opened(server) as client, client.open_session("policy_1") as session:
        assert (await client.reward(Sequence("p", "ab")))[0].score == 2.0
        with pytest.raises(ResourceExhaustedError) as caught:
            await session.score(Sequence("p", "ab"), timeout=50)

    assert caught.value.retry_after == 3600
    assert len(server.requests["Score"]) == 1


async def test_a_server_that_stays_away_is_told_as_what_it_is_and_not_as_a_deadline(server):
    server.fail("GetStatus", *[UNAVAILABLE] * 10_000)

    async with opened(server) as client:
        with pytest.raises(UnavailableError, match="draining"):
            await client.status(timeout=1.0)

    assert len(server.requests["GetStatus"]) > 1


async def test_a_call_that_is_not_answered_ends_at_its_deadline(server):
    server.hold = threading.Event()

    async with opened(server) as client:
        with pytest.raises(DeadlineExceededError, match="Generate was not answered within its timeout"):
            await client.generate("ab", adapter="base", sampling=SamplingParams(max_new_tokens=2, n=2), timeout=0.2)


async def test_a_large_message_passes_both_ways_and_one_beyond_the_limit_is_refused_here(server):
    text = "x" * (5 * 1024 * 1024)
    async with opened(server) as client:
        (result,) = await client.logprob(Sequence("p", text), adapter="base")
        with pytest.raises(ResourceExhaustedError):
            await client.reward(Sequence("p", text * 13))

    assert result.logprobs.shape == result.completion_tokens.shape == (len(text),)
    assert not server.requests["Reward"]


# ----------------------------------------------------------------------------------------------------- streams


async def test_a_stream_that_fails_before_its_first_message_begins_again(server):
    server.fail("Generate", UNAVAILABLE, UNAVAILABLE)

    async with opened(server) as client:
        assert (await client.generate("ab", adapter="base", sampling=TWO_TOKENS))[0].text == "ab"

    assert len(server.requests["Generate"]) == 3


async def test_a_stream_that_has_begun_is_not_repeated(server):
    server.hold = threading.Event()
    async with opened(server) as client:
        stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
        assert (await anext(stream)).text == "a"

        server.grpc_server.stop(0).wait()

        with pytest.raises((UnavailableError, CancelledError)):
            await anext(stream)
    assert len(server.requests["Generate"]) == 1


async def test_what_is_read_as_a_whole_begins_anew_when_its_stream_is_cut(server):
    server.cuts = 2

    async with opened(server) as client:
        assert (await client.generate("ab", adapter="base", sampling=TWO_TOKENS))[0].text == "ab"

    assert len(server.requests["Generate"]) == 3


async def test_closing_a_stream_cancels_the_call(server):
    server.hold = threading.Event()
    async with opened(server) as client:
        stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
        assert (await anext(stream)).text == "a"

        await stream.close()

        assert await cancelled(server)
        assert [chunk async for chunk in stream] == []
        await stream.close()


async def test_leaving_the_block_of_a_stream_cancels_the_call(server):
    server.hold = threading.Event()

    async with opened(server) as client:
        async with client.stream("ab", adapter="base", sampling=TWO_TOKENS) as stream:
            await anext(stream)

        assert await cancelled(server)


async def test_a_stream_that_is_dropped_cancels_the_call(server):
    server.hold = threading.Event()

    async with opened(server) as client:
        async for chunk in client.stream("ab", adapter="base", sampling=TWO_TOKENS):
            assert chunk.text == "a"
            break

        assert await cancelled(server)


async def test_another_task_can_close_a_stream_that_waits(server):
    server.hold = threading.Event()
    async with opened(server) as client:
        stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
        await anext(stream)

        async def rest():
            return [chunk async for chunk in stream]

        reader = asyncio.create_task(rest())
        await asyncio.sleep(0.05)
        await stream.close()

        assert await asyncio.wait_for(reader, 60) == []


async def test_closing_a_stream_does_not_swallow_that_its_reader_is_cancelled(server):
    server.hold = threading.Event()
    async with opened(server) as client:
        stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
        await anext(stream)
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)

        await stream.close()
        reader.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reader


# ------------------------------------------------------------------------------------------------ cancellation


async def test_cancelling_a_task_cancels_its_call(server):
    server.hold = threading.Event()
    async with opened(server) as client:
        task = asyncio.create_task(client.generate("ab", adapter="base", sampling=SamplingParams(n=2)))
        await arrived(server, "Generate", 1)
        await asyncio.sleep(0.05)

        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(server)
        assert (await client.info()).version == "9.9"


async def test_cancelling_a_task_that_waits_for_its_retry_ends_it(server):
    server.fail("GetServerInfo", UNAVAILABLE)
    transport = Transport(server.target, timeout=600, backoff=Backoff(first=500, longest=500))
    task = asyncio.create_task(transport.run(server_codec.info()))
    await arrived(server, "GetServerInfo", 1)
    await asyncio.sleep(0.05)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(server.requests["GetServerInfo"]) == 1
    await transport.close()


async def test_a_timeout_of_asyncio_ends_a_call_as_a_timeout(server):
    server.hold = threading.Event()
    async with opened(server) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate("ab", adapter="base", sampling=SamplingParams(n=2))

        assert await cancelled(server)


async def test_one_cancelled_task_leaves_the_others_alone(server):
    async with opened(server) as client:
        calls = [asyncio.create_task(client.reward(Sequence("p", "x" * size))) for size in range(1, 33)]
        calls[4].cancel()

        answers = await asyncio.gather(*calls, return_exceptions=True)

    assert isinstance(answers[4], asyncio.CancelledError)
    assert [a[0].score for i, a in enumerate(answers) if i != 4] == [float(s) for s in range(1, 33) if s != 5]


# --------------------------------------------------------------------------------------- opening and closing


async def test_connecting_is_awaited_or_entered(server):
    client = await connect(server.target)
    assert (await client.info()).version == "9.9"
    await client.close()

    async with connect(server.target) as client:
        assert (await client.info()).version == "9.9"
        assert server.target in repr(client)


async def test_connecting_waits_for_a_server_that_comes_up_later():
    first = FakeServer().start()
    first.stop()
    later = FakeServer()
    timer = threading.Timer(0.3, lambda: later.start(first.port))
    timer.start()

    async with connect(first.target, wait=60) as client:
        assert (await client.info()).version == "9.9"

    timer.join()
    later.stop()


async def test_connecting_in_vain_names_the_address_and_the_command():
    server = FakeServer().start()
    server.stop()

    with pytest.raises(UnavailableError) as caught:
        await connect(server.target, wait=0)

    assert server.target in str(caught.value)
    assert "onebase serve" in str(caught.value)
    assert "refused" in str(caught.value)


async def test_a_target_without_a_port_is_refused():
    with pytest.raises(ValueError, match=r"target 'localhost' has no port"):
        await connect("localhost")


async def test_a_closed_client_says_so(server):
    client = await connect(server.target)
    await client.close()
    await client.close()

    with pytest.raises(CancelledError, match="closed"):
        await client.info()
    with pytest.raises(CancelledError, match="closed"):
        client.stream("ab", adapter="base")


async def test_closing_ends_calls_and_streams_that_wait_without_cancelling_their_tasks(server):
    server.hold = threading.Event()
    client = await connect(server.target)
    stream = client.stream("ab", adapter="base", sampling=TWO_TOKENS)
    await anext(stream)
    with server.lock:  # no call that is not a stream is answered
        calls = [anext(stream), client.generate("ab", adapter="base", sampling=TWO_TOKENS), client.status()]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await arrived(server, "GetStatus", 1)

        await client.close()
        failures = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(failure) for failure in failures] == [CancelledError] * 3
    assert {failure.reason for failure in failures} == {"CLIENT_CLOSED"}


async def test_closing_ends_a_call_that_waits_for_its_retry(server):
    transport = Transport(server.target, timeout=600, backoff=Backoff(first=500, longest=500))
    server.fail("GetServerInfo", UNAVAILABLE)
    task = asyncio.create_task(transport.run(server_codec.info()))
    await arrived(server, "GetServerInfo", 1)
    await asyncio.sleep(0.05)

    await transport.close()

    with pytest.raises(CancelledError, match="closed"):
        await asyncio.wait_for(task, 60)


def test_a_program_that_forgets_to_close_ends_at_once_and_in_silence(server):
    program = (
        "import asyncio, sys, onebase.client as onebase\n"
        "async def main():\n"
        "    client = await onebase.connect_async(sys.argv[1])\n"
        "    session = await client.open_session('policy_1')\n"
        "    stream = client.stream('ab', adapter='base')\n"
        "    print((await anext(stream)).text)\n"
        "    return stream, session\n"
        "kept = asyncio.run(main())\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, server.target], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "a\n", "")
    assert time.monotonic() - begin < 30
