"""Random requests, files and connections: whatever comes, the answer is no bug, and the server lives.

`make fuzz` tries a hundred thousand, with the same generators (tests/fuzz).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import grpc
import pytest
from faults.conftest import Place
from faults.test_bytes import upload
from fuzz import calls, grammar, raw, reading
from google.protobuf.descriptor import MethodDescriptor
from oracle.fixtures import FIXTURES
from server.harness import pair

from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2

pytestmark = pytest.mark.e2e

COUNT = 60
PLACES = [FIXTURES / name for name in ("policy", "policy_all", "reward")]
WHOLES = [{file.name: file.read_bytes() for file in place.iterdir()} for place in PLACES]


@pytest.fixture(scope="module")
def place(make_place: Callable[..., Place]) -> Place:
    """A server of its own: some of what comes is carried out, and writes under its root."""
    return make_place("--tenant-quota", "adapter_bytes=64M")


@pytest.fixture(scope="module")
def session(place: Place) -> str:
    fuzz = place.as_("fuzz")
    for name in calls.NAMED:
        fuzz.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name=name, value_head=True))
    opened = fuzz.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ppo_adapter_name="x", ttl_seconds=3600))
    return opened.session_id


def problems(place: Place, some: list[calls.Call]) -> list[tuple[str, calls.Call]]:
    """What is wrong with these calls, sent all at once."""

    async def send() -> list[calls.Told]:
        async with grpc.aio.insecure_channel(place.server.address) as channel:
            return list(await asyncio.gather(*(calls.send(channel, call) for call in some)))

    told = asyncio.run(send())
    return [(one.problem, call) for one, call in zip(told, some, strict=True) if one.problem is not None]


@pytest.mark.parametrize("method", [*grammar.METHODS, *calls.OTHERS], ids=lambda method: method.name)
def test_random_requests(place: Place, session: str, method: MethodDescriptor) -> None:
    valid, token = calls.valid_requests(session), place.as_("fuzz").token
    some = [calls.call_of(Random(f"{method.name}/{number}"), method, session, valid, token) for number in range(COUNT)]
    assert problems(place, some) == []


def test_random_files(place: Place) -> None:
    token = place.as_("fuzz-files").token
    some = []
    for number in range(COUNT):
        _, files = reading.drawn(0, number, WHOLES)
        messages = tuple(one.SerializeToString() for one in upload(f"x{number}", files))
        some.append(calls.Call("/onebase.v1.AdapterService/UploadAdapter", messages, True, False, token))
    assert problems(place, some) == []


def test_random_connections_leave_the_port_to_others(place: Place) -> None:
    async def throw() -> None:
        await asyncio.gather(*(raw.throw(place.server.address, Random(number)) for number in range(COUNT)))

    asyncio.run(throw())
    request = inference_pb2.LogprobRequest(adapter="base", sequences=[pair((5, 6), (7,))])
    assert place.as_("fuzz").inference.Logprob(request, timeout=20).results


def test_what_the_generators_draw_is_spoiled_and_the_same_again() -> None:
    valid = calls.valid_requests("s")["Score"]
    drawn = [
        [grammar.request(Random(number), grammar.METHODS[-1], "s", valid) for number in range(200)] for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 150
    files = [reading.drawn(0, number, WHOLES)[1] for number in range(200)]
    assert files == [reading.drawn(0, number, WHOLES)[1] for number in range(200)]
    assert sum(one in WHOLES for one in files) < 20
