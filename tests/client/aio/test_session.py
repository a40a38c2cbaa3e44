import asyncio
import gc
import weakref

import grpc
import numpy as np
import pytest
from client.aio.opened import arrived, becomes, opened
from client.wire import Failure

import onebase.client as onebase
from onebase.client import types as t
from onebase.client.aio import connect
from onebase.client.aio.keepalive import KeepAlive
from onebase.client.aio.transport import Transport
from onebase.client.codec import sessions as sessions_codec
from onebase.client.errors import AbortedError, FailedPreconditionError, NotFoundError

ATTEND = sessions_codec.attend("f" * 32)
HELD = Failure(grpc.StatusCode.ABORTED, "policy_1 is leased", reason="LEASE_HELD", retry_after=0.001)
PAIR, ROW = t.Sequence("p", "abc"), t.TrainingSequence([1], [2], *[np.zeros(1, np.float32)] * 4)
SAMPLING = t.SamplingParams(max_new_tokens=2, n=2, seed=5)

CALLS = {
    "info": lambda c, s, p: c.info(),
    "status": lambda c, s, p: c.status(),
    "client create": lambda c, s, p: c.create_adapter("new", t.LoraSpec(rank=4)),
    "client load": lambda c, s, p: c.load_adapter("r", "there", kind="reward"),
    "client adapters": lambda c, s, p: c.adapters("reward"),
    "client save": lambda c, s, p: c.save_adapter("new", "out", overwrite=True),
    "client generate": lambda c, s, p: c.generate(["ab", [1, 2]], adapter="a", sampling=SAMPLING, logprobs=True),
    "client logprob": lambda c, s, p: c.logprob(PAIR, adapter="a", entropy=True),
    "client reference": lambda c, s, p: c.reference_logprob(PAIR, reference="ref"),
    "client reward": lambda c, s, p: c.reward([PAIR, PAIR], ["x", "y"], per_token=True),
    "session create": lambda c, s, p: s.create_adapter("policy_1", seed=3),
    "session adapter": lambda c, s, p: s.adapter("policy_1"),
    "session generate": lambda c, s, p: s.generate("ab", sampling=SAMPLING, values=True, adapter_version=7),
    "session logprob": lambda c, s, p: s.logprob(PAIR),
    "session reward": lambda c, s, p: s.reward(PAIR, append_eos=True, ppo_adapter_name="policy_2"),
    "session score": lambda c, s, p: s.score(PAIR, rewards={"x": -1.0, "y": 0.5}, ppo_adapter_name="policy_1"),
    "session forward_backward": lambda c, s, p: s.forward_backward(ROW, denominator=2.0),
    "session optim_step": lambda c, s, p: s.optim_step(t.AdamW(1e-3), max_grad_norm=1.0),
    "session save": lambda c, s, p: s.save_adapter("there", with_optimizer=True),
    "session set_active": lambda c, s, p: s.set_active("policy_2"),
    "session refresh": lambda c, s, p: s.refresh(),
    "policy facts": lambda c, s, p: p.facts(),
    "policy generate": lambda c, s, p: p.generate("ab", sampling=SAMPLING),
    "policy logprob": lambda c, s, p: p.logprob(PAIR, values=True),
    "policy score": lambda c, s, p: p.score(PAIR, outputs=["logprobs"]),
    "policy forward_backward": lambda c, s, p: p.forward_backward([ROW], expected_version=7),
    "policy optim_step": lambda c, s, p: p.optim_step(t.AdamW(1e-3)),
    "policy save": lambda c, s, p: p.save("there"),
    "session delete": lambda c, s, p: s.delete_adapter("new"),
}


def sent(server):
    """What the server has received, without what is drawn anew each time; forgotten afterwards."""
    found = []
    for method, requests in server.requests.items():
        for request in requests:
            if "request_id" in request.DESCRIPTOR.fields_by_name:
                assert request.request_id
                request.ClearField("request_id")
            found.append((method, request.SerializeToString(deterministic=True)))
    server.requests.clear()
    return found


async def test_both_clients_send_the_same_requests_and_read_the_same_answers(server):
    def reset():
        server.sessions.clear()
        server.adapters.clear()
        server.gradients = 0
        server.requests.clear()

    reset()
    with onebase.connect(server.target) as client, client.open_session("policy_1", label="x") as session:
        policy, expected = session.policy(), [sent(server)]
        expected += [(name, repr(call(client, session, policy)), sent(server)) for name, call in CALLS.items()]
        expected += [[(chunk.text, chunk.finish_reason) for chunk in session.stream("abc")], session.ppo_adapter_name]

    reset()
    async with connect(server.target) as client, client.open_session("policy_1", label="x") as session:
        policy, found = session.policy(), [sent(server)]
        found += [(name, repr(await call(client, session, policy)), sent(server)) for name, call in CALLS.items()]
        stream = session.stream("abc")
        found += [[(chunk.text, chunk.finish_reason) async for chunk in stream], session.ppo_adapter_name]

    assert found == expected


def test_both_clients_have_the_same_methods():
    for kind in ("Client", "Session", "Policy", "Stream"):
        sync, other = getattr(onebase, kind), getattr(onebase, f"Async{kind}")
        assert {n for n in dir(sync) if n[0] != "_"} == {n for n in dir(other) if n[0] != "_"}


# ------------------------------------------------------------------------------------------- opening and closing


async def test_leaving_the_block_closes_the_session_and_its_task(server):
    async with opened(server) as client:
        async with client.open_session("policy_1") as session:
            assert session._keepalive.running

        assert server.sessions == {}
        assert not session._keepalive.running
        await session.close()
    assert len(server.requests["CloseSession"]) == 1


async def test_closing_the_client_gives_the_leases_back(server):
    async with connect(server.target) as client:
        first, second = await client.open_session("policy_1"), await client.open_session("policy_2")
        assert len(server.sessions) == 2

    assert server.sessions == {}
    assert not first._keepalive.running
    assert not second._keepalive.running


async def test_a_task_that_is_cancelled_in_the_block_gives_the_lease_back(server):
    async def work():
        async with connect(server.target) as client, client.open_session("policy_1"):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await arrived(server, "OpenSession", 1)
    await becomes(lambda: server.sessions)
    await asyncio.sleep(0.05)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.sessions == {}


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE])
async def test_closing_what_has_ended_or_cannot_be_reached_is_no_error(server, code):
    async with opened(server) as client:
        session = await client.open_session("policy_1")
        server.fail("CloseSession", Failure(code))

        await session.close()


async def test_an_error_in_the_block_is_not_hidden_by_closing(server):
    async def work(client):
        async with client.open_session("policy_1"):
            server.fail("CloseSession", Failure(grpc.StatusCode.UNAVAILABLE))
            raise KeyError

    async with opened(server) as client:
        with pytest.raises(KeyError):
            await work(client)


async def test_a_held_lease_is_waited_for_or_told_at_once(server):
    async with opened(server) as client:
        server.fail("OpenSession", HELD, HELD, HELD)
        assert (await client.open_session("policy_1", wait=60)).ppo_adapter_name == "policy_1"
        assert len(server.requests["OpenSession"]) == 4

        server.fail("OpenSession", HELD)
        with pytest.raises(AbortedError, match="leased"):
            await client.open_session("policy_1")


# ----------------------------------------------------------------------------------------------- staying alive


async def test_a_session_is_kept_alive_three_times_per_ttl_and_survives_a_server_that_is_away(server):
    async with opened(server) as client:
        session = await client.open_session("policy_1", ttl=0.03)
        server.fail("KeepAlive", *[Failure(grpc.StatusCode.UNAVAILABLE)] * 5, Failure(grpc.StatusCode.INTERNAL))

        await arrived(server, "KeepAlive", 10)

        assert session._keepalive.running
        assert {request.session_id for request in server.requests["KeepAlive"]} == {session.id}


async def test_a_session_that_has_ended_is_not_kept_alive(server):
    async with opened(server) as client:
        session = await client.open_session("policy_1", ttl=0.03)
        server.sessions.clear()

        await becomes(lambda: not session._keepalive.running)

        with pytest.raises(NotFoundError):
            await session.refresh()


class Heart:
    def __init__(self):
        self.beaten = asyncio.Event()

    async def beat(self):
        self.beaten.set()
        return True


async def test_a_task_does_not_keep_alive_what_was_forgotten(server):
    heart, transport = Heart(), Transport(server.target, timeout=60.0)
    keepalive = KeepAlive(transport, ATTEND, heart.beat, 0.001)
    await asyncio.wait_for(heart.beaten.wait(), 60)
    forgotten = weakref.ref(heart)

    del heart
    await becomes(lambda: not keepalive.running)
    gc.collect()

    assert forgotten() is None
    await transport.close()


async def test_stopping_cancels_a_beat_under_way(server):
    begun = asyncio.Event()

    class Slow:
        async def beat(self):
            begun.set()
            await asyncio.sleep(60)
            return True

    slow, transport = Slow(), Transport(server.target, timeout=60.0)
    keepalive = KeepAlive(transport, ATTEND, slow.beat, 0.001)
    await asyncio.wait_for(begun.wait(), 60)

    await keepalive.stop(60)

    assert not keepalive.running
    await transport.close()


# --------------------------------------------------------------------------------------------------- attending


async def test_a_session_is_attended_until_it_is_closed_and_its_task_ends(server):
    server.attends = True
    async with opened(server) as client:
        session = await client.open_session("policy_1", ttl=0.03)
        await arrived(server, "AttendSession", 1)
        await asyncio.sleep(0.1)
        assert session._keepalive.running
        assert {request.session_id for request in server.requests["AttendSession"]} == {session.id}
        assert not server.requests["KeepAlive"]

        await session.close()

        assert not session._keepalive.running
        assert server.sessions == {}


async def test_a_stream_that_breaks_is_opened_again(server):
    server.attends, server.cuts = True, 3
    server.fail("AttendSession", Failure(grpc.StatusCode.CANCELLED), Failure(grpc.StatusCode.INTERNAL))
    async with opened(server) as client, client.open_session("policy_1", ttl=0.03) as session:
        await arrived(server, "AttendSession", 6)
        assert session._keepalive.running


async def test_a_session_that_ended_or_a_client_that_was_closed_is_attended_no_more(server):
    server.attends = True
    async with opened(server) as client:
        ended, other = await client.open_session("policy_1"), await client.open_session("policy_2")
        await arrived(server, "AttendSession", 2)
        del server.sessions[ended.id]
        await becomes(lambda: not ended._keepalive.running)
        assert other._keepalive.running
        await client._transport.close()
        await becomes(lambda: not other._keepalive.running)


async def test_a_forgotten_session_is_let_go(server):
    server.attends = True
    async with opened(server) as client:
        session = await client.open_session("policy_1")
        await arrived(server, "AttendSession", 1)
        keepalive = session._keepalive

        del session
        gc.collect()

        await becomes(lambda: not keepalive.running)


# -------------------------------------------------------------------------------------------- the active adapter


async def test_a_failed_call_that_named_an_adapter_leaves_no_doubt_which_is_active(server):
    async with opened(server) as client, client.open_session("policy_1") as session:
        server.fail("Score", Failure(grpc.StatusCode.FAILED_PRECONDITION, "no value head", after_the_work=True))

        with pytest.raises(FailedPreconditionError):
            await session.score(PAIR, ppo_adapter_name="policy_2")

        assert session.ppo_adapter_name == server.sessions[session.id].ppo_adapter_name == "policy_2"
