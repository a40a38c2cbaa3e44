from __future__ import annotations

import asyncio

import pytest

from onebase.server.errors import Aborted, Cancelled, DeadlineExceeded, FailedPrecondition, InvalidArgument
from onebase.server.idempotency import Idempotency
from onebase.v1 import adapters_pb2

Request = adapters_pb2.CreateAdapterRequest
Response = adapters_pb2.SaveAdapterResponse


class Work:
    """Counts its runs; each waits for `go` and then gives its number, or the error set for it."""

    def __init__(self):
        self.runs = 0
        self.go = asyncio.Event()
        self.errors: dict[int, Exception] = {}
        self.stubborn = False
        self.cancels = 0

    async def __call__(self):
        self.runs += 1
        number = self.runs
        while True:
            try:
                await self.go.wait()
                break
            except asyncio.CancelledError:
                self.cancels += 1
                if not self.stubborn:
                    raise Cancelled("CANCELLED", "dropped") from None
        if number in self.errors:
            raise self.errors[number]
        return Response(bytes=number)


def request(name="a", session="s", request_id="r"):
    return Request(session_id=session, request_id=request_id, name=name)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def in_loop(test):
    def run():
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


@in_loop
async def test_the_same_id_and_payload_get_the_stored_answer():
    idempotency, work = Idempotency(), Work()
    work.go.set()
    first = await idempotency.run("M", request(), work)
    assert (await idempotency.run("M", request(), work)) == first
    assert work.runs == 1


@in_loop
async def test_another_method_session_or_id_is_another_call():
    idempotency, work = Idempotency(), Work()
    work.go.set()
    for method, one in (
        ("M", request()),
        ("N", request()),
        ("M", request(session="t")),
        ("M", request(request_id="q")),
    ):
        await idempotency.run(method, one, work)
    assert work.runs == 4


@in_loop
async def test_without_an_id_nothing_is_stored():
    idempotency, work = Idempotency(), Work()
    work.go.set()
    for expected in (1, 2):
        assert (await idempotency.run("M", request(request_id=""), work)).bytes == expected


@in_loop
async def test_another_payload_is_refused_while_it_runs_and_afterwards():
    idempotency, work = Idempotency(), Work()
    first = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    with pytest.raises(Aborted) as caught:
        await idempotency.run("M", request(name="b"), work)
    assert caught.value.reason == "REQUEST_ID_REUSED"
    work.go.set()
    await first
    with pytest.raises(Aborted):
        await idempotency.run("M", request(name="b"), work)
    assert work.runs == 1


@in_loop
async def test_duplicates_at_the_same_time_share_one_run():
    idempotency, work = Idempotency(), Work()
    tasks = [asyncio.create_task(idempotency.run("M", request(), work)) for _ in range(5)]
    await settle()
    work.go.set()
    assert {(await task).bytes for task in tasks} == {1}


@in_loop
async def test_a_failed_call_is_not_stored_and_its_error_goes_to_all_who_waited():
    idempotency, work = Idempotency(), Work()
    work.errors[1] = FailedPrecondition("NO", "no")
    tasks = [asyncio.create_task(idempotency.run("M", request(), work)) for _ in range(2)]
    await settle()
    work.go.set()
    for task in tasks:
        with pytest.raises(FailedPrecondition):
            await task
    assert (await idempotency.run("M", request(), work)).bytes == 2


@in_loop
async def test_the_first_clients_cancel_does_not_take_the_answer_from_the_second():
    idempotency, work = Idempotency(), Work()
    first = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    second = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled()
    work.go.set()
    assert (await second).bytes == 1
    assert (work.runs, work.cancels) == (1, 0)


@in_loop
async def test_a_cancel_of_the_only_client_stops_the_work():
    idempotency, work = Idempotency(), Work()
    first = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    first.cancel()
    await settle()
    assert work.cancels == 1
    work.go.set()
    assert (await idempotency.run("M", request(), work)).bytes == 2


@in_loop
async def test_work_too_late_to_stop_is_stored_for_the_retry():
    idempotency, work = Idempotency(), Work()
    work.stubborn = True
    first = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled()
    work.go.set()
    await settle()
    assert (await idempotency.run("M", request(), work)).bytes == 1
    assert (work.runs, work.cancels) == (1, 1)


@in_loop
async def test_who_comes_while_a_cancelled_call_ends_makes_it_again():
    idempotency, work = Idempotency(), Work()
    first = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    first.cancel()
    second = asyncio.create_task(idempotency.run("M", request(), work))
    await settle()
    work.go.set()
    assert (await second).bytes == 2


@pytest.mark.parametrize("error", [DeadlineExceeded("D", "late"), Cancelled("C", "gone")])
def test_the_first_clients_deadline_is_not_the_seconds(error):
    async def run():
        idempotency, work = Idempotency(), Work()
        work.errors[1] = error
        first = asyncio.create_task(idempotency.run("M", request(), work))
        await settle()
        second = asyncio.create_task(idempotency.run("M", request(), work))
        await settle()
        work.go.set()
        with pytest.raises(type(error)):
            await first
        assert (await second).bytes == 2

    asyncio.run(run())


@in_loop
async def test_the_answers_not_asked_for_the_longest_are_forgotten_first():
    idempotency, work = Idempotency(capacity=2), Work()
    work.go.set()
    for one in ("a", "b", "a", "c"):
        await idempotency.run("M", request(request_id=one), work)
    assert work.runs == 3
    await idempotency.run("M", request(request_id="a"), work)
    assert work.runs == 3
    await idempotency.run("M", request(request_id="b"), work)
    assert work.runs == 4


@in_loop
async def test_of_large_answers_that_had_to_go_it_is_known_that_they_were_given():
    idempotency = Idempotency(capacity_bytes=1000)
    runs = []

    async def work():
        runs.append(1)
        return Response(path="x" * 700)

    for one in ("a", "b"):
        await idempotency.run("ForwardBackward", request(request_id=one), work)
    await idempotency.run("ForwardBackward", request(request_id="b"), work)
    with pytest.raises(Aborted) as caught:
        await idempotency.run("ForwardBackward", request(request_id="a"), work)
    assert (caught.value.reason, caught.value.field) == ("ANSWER_FORGOTTEN", "request_id")
    assert len(runs) == 2


@in_loop
async def test_large_answers_of_passes_push_out_none_of_steps():
    idempotency, work = Idempotency(capacity=3, capacity_bytes=1000), Work()
    work.go.set()
    await idempotency.run("OptimStep", request(request_id="step"), work)
    for number in range(20):
        await idempotency.run("ForwardBackward", request(request_id=f"r{number}"), work)
    assert (await idempotency.run("OptimStep", request(request_id="step"), work)).bytes == 1


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb", "\0"])
def test_an_id_that_is_none_is_refused(request_id):
    async def run():
        with pytest.raises(InvalidArgument) as caught:
            await Idempotency().run("M", request(request_id=request_id), Work())
        assert (caught.value.reason, caught.value.field) == ("BAD_REQUEST_ID", "request_id")

    asyncio.run(run())
