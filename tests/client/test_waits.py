"""Who waits for a server is told so, once, and once more when it is over."""

from __future__ import annotations

import logging

import grpc
import pytest
from client.wire import Failure

from onebase.client.aio.transport import Transport as AsyncTransport
from onebase.client.client import Client
from onebase.client.codec import server as server_codec
from onebase.client.errors import ResourceExhaustedError, UnavailableError
from onebase.client.retry import Backoff
from onebase.client.transport import Transport
from onebase.client.types import SamplingParams, Sequence
from onebase.client.waits import Waits

AWAY = Failure(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")
LOADING = Failure(grpc.StatusCode.UNAVAILABLE, "the server still loads", reason="LOADING")
FULL = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full", reason="DISK_FULL", retry_after=0.01)
QUICK = Backoff(first=0.001, longest=0.002)


@pytest.fixture
def told():
    return []


@pytest.fixture
def client(server, told):
    transport = Transport(server.target, timeout=600.0, backoff=QUICK)
    transport._waits = Waits(server.target, told.append, after=0.0)
    with Client(transport) as client:
        yield client


def test_one_line_when_waiting_begins_and_one_when_it_is_over(server, client, told):
    server.fail("Reward", AWAY, LOADING, AWAY)
    client.reward(Sequence("p", "abc"))
    begun, over = map(str, told)
    assert begun.startswith(f"{server.target} does not answer (UNAVAILABLE): waiting up to 10 min;")
    assert over == f"{server.target} answers again, after 0 s"
    assert [(one.over, one.error.reason) for one in told] == [(False, ""), (True, "")]


def test_another_reason_is_told_too_with_the_servers_words(server, client, told):
    server.fail("Reward", AWAY, FULL, FULL)
    client.reward(Sequence("p", "abc"))
    assert [one.over for one in told] == [False, False, True]
    assert str(told[1]).startswith(f"{server.target} lets calls wait (DISK_FULL): the disk is full; waiting up to")


def test_streams_wait_too(server, client, told):
    for ask in (
        lambda: client.generate("p", adapter="base", sampling=SamplingParams(max_new_tokens=2)),
        lambda: list(client.stream("p", adapter="base", sampling=SamplingParams(max_new_tokens=2))),
    ):
        told.clear()
        server.fail("Generate", AWAY)
        ask()
        assert [one.over for one in told] == [False, True]


def test_who_gives_up_is_not_told_that_it_is_over(server, client, told):
    server.fail("Reward", *[AWAY] * 1000)
    with pytest.raises(UnavailableError):
        client.reward(Sequence("p", "abc"), timeout=0.5)
    assert [one.over for one in told] == [False]
    server.failures["Reward"].clear()
    client.reward(Sequence("p", "abc"))
    assert len(told) == 1


def test_what_passes_soon_is_told_to_nobody(server, caplog):
    caplog.set_level(logging.INFO, logger="onebase.client")
    with Client(Transport(server.target, timeout=60.0, backoff=QUICK)) as client:
        server.fail("Reward", AWAY, FULL)
        client.reward(Sequence("p", "abc"))
    assert not caplog.records


async def test_logging_is_told_where_nothing_else_is_and_with_asyncio_too(server, caplog):
    caplog.set_level(logging.INFO, logger="onebase.client")
    transport = AsyncTransport(server.target, timeout=60.0, backoff=QUICK)
    transport._waits = Waits(server.target, after=0.0)
    server.fail("GetServerInfo", AWAY)
    await transport.run(server_codec.info())
    await transport.close()
    assert [(record.name, record.levelno) for record in caplog.records] == [
        ("onebase.client", logging.WARNING),
        ("onebase.client", logging.INFO),
    ]


def test_it_is_over_when_the_last_call_is_answered_and_forgotten_calls_count_no_more(told):
    class Call:
        pass

    waits, one, two = Waits("here:1", told.append, after=0.0), Call(), Call()
    full = ResourceExhaustedError("full", reason="QUOTA_REQUESTS")
    waits.waiting(one, full, 0.1, 10)
    waits.waiting(two, full, 0.1, 10)
    waits.answered(one)
    assert [wait.over for wait in told] == [False]
    del two  # cancelled
    waits.waiting(one, full, 0.1, 10)
    waits.answered(one)
    assert [wait.over for wait in told] == [False, False, True]
