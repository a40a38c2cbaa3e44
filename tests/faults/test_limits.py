"""Too much at once: floods, bombs, and clients that do not read."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from faults.conftest import PROMPT, QUOTA, Place, at_rest, endless
from server.harness import pair, refusal_of, refused, text_of
from server.tenants import Client

from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2

pytestmark = pytest.mark.e2e

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
INFO = server_pb2.GetServerInfoRequest()


def slow() -> inference_pb2.LogprobRequest:
    return inference_pb2.LogprobRequest(adapter="base", sequences=[pair(tuple(range(4, 60)), tuple(range(4, 60)))] * 32)


def test_10_a_full_queue_says_when_to_come_again(place: Place) -> None:
    red = place.as_("red")
    session = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    streams = [red.inference.Generate(endless()) for _ in range(QUOTA)]
    place.wait_until(lambda now: sum(one.waiting + one.running for one in now.queues) >= QUOTA, 20)
    refusal = refused(red.inference.Logprob, slow())
    assert (refusal.code, refusal.reason) == (FULL, "QUOTA_REQUESTS")
    assert 0 < (refusal.retry_after or 0) <= 30
    red.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    for stream in streams:
        stream.cancel()
    place.wait_until(lambda now: all(one.waiting + one.running == 0 for one in now.queues), 20)
    assert red.inference.Logprob(slow()).results


@pytest.mark.fault(11, times=3)
def test_11_of_a_tenant_that_floods_only_its_own_calls_are_refused(place: Place) -> None:
    """Blue has 4 calls under way at any time, and red all 16 that it may: first come, first served is a fifth."""
    done, enough = Counter[str](), threading.Event()

    def work(tenant: str) -> None:
        client = place.as_(tenant)
        while not enough.is_set():
            call = client.inference.Logprob.future(slow())
            if call.exception() is None:
                done[tenant] += 1
                continue
            assert tenant == "red"
            refusal = refusal_of(call.exception())
            assert (refusal.code, refusal.reason) == (FULL, "QUOTA_REQUESTS")
            done["refused"] += 1
            time.sleep(0.05)

    with ThreadPoolExecutor(QUOTA + 8) as pool:
        working = [pool.submit(work, "red") for _ in range(QUOTA + 4)]
        place.wait_until(lambda now: sum(one.waiting + one.running for one in now.queues) >= QUOTA - 1, 20)
        working += [pool.submit(work, "blue") for _ in range(4)]
        before = done.copy()
        until = time.monotonic() + 60
        while done["blue"] < 40 and time.monotonic() < until:
            time.sleep(0.02)
        after = done.copy()
        enough.set()
        for one in working:
            one.result(60)
    blue, red = (after[tenant] - before[tenant] for tenant in ("blue", "red"))
    assert done["refused"]
    assert red
    assert blue / (blue + red) > 0.4, (blue, red)  # half each, and red pays for what is refused


@pytest.mark.fault(13, times=3)
def test_13_a_message_over_the_limit_is_refused(place: Place) -> None:
    red = place.as_("red")
    metadata = (("authorization", f"Bearer {red.token}"),)
    for over in (1, 2**20):
        call = place.channel.unary_unary("/onebase.v1.InferenceService/Logprob")
        refusal = refused(call, bytes(64 * 2**20 + over), bare=(FULL,), metadata=metadata)
        assert refusal.code is FULL
    upload = place.channel.stream_unary("/onebase.v1.AdapterService/UploadAdapter")
    assert refused(upload, iter([bytes(65 * 2**20)]), bare=(FULL,), metadata=metadata).code is FULL
    assert red.server.GetServerInfo(INFO)


@pytest.mark.fault(14, times=2)
def test_14_a_bomb_of_gzip_takes_no_memory(place: Place) -> None:
    call = place.channel.unary_unary("/onebase.v1.InferenceService/Logprob")
    metadata = (("authorization", f"Bearer {place.operator.token}"),)
    with place.flat(100 * 2**20):  # as much as one message may have, and some
        bomb = {"compression": grpc.Compression.Gzip, "metadata": metadata, "timeout": 100}
        refusal = refused(call, bytes(512 * 2**20), bare=(FULL,), **bomb)
    assert refusal.code is FULL


def test_19_what_is_too_long_is_refused(place: Place) -> None:
    red = place.as_("red")
    long = inference_pb2.LogprobRequest(adapter="base", sequences=[pair(tuple(range(4, 100)), tuple(range(4, 100)))])
    refusal = refused(red.inference.Logprob, long)
    wanted = (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_TOO_LONG", "sequences[0]")
    assert (refusal.code, refusal.reason, refusal.field) == wanted
    for wanted in (2**31 - 1, 1000, -1):
        absurd = inference_pb2.GenerateRequest(
            adapter="base", prompts=[text_of(PROMPT)], sampling={"max_new_tokens": wanted}
        )
        refusal = refused(red.inference.Generate, absurd)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.max_new_tokens")


def test_24_a_bomb_of_ranks_is_refused_before_anything_is_allocated(place: Place) -> None:
    red = place.as_("red")
    with place.flat(128 * 2**20):
        _bombs(place, red)


def _bombs(place: Place, red: Client) -> None:
    def ask(**lora: object) -> adapters_pb2.CreateAdapterRequest:
        lora = {"alpha": 1, "target_modules": ["all-linear"], **lora}
        return adapters_pb2.CreateAdapterRequest(name="bomb", lora=lora)

    for rank in (2**31 - 1, 513):
        for spec in ({"rank": rank}, {"rank": 1, "rank_pattern": {"q_proj": rank}}):
            refusal = refused(red.adapters.CreateAdapter, ask(**spec))
            assert (refusal.code, refusal.reason) == (FULL, "LIMIT_EXCEEDED")
    # Within the largest rank, one after the other: until the tenant's bytes are used up, and never over.
    made = 0
    while True:
        try:
            red.adapters.CreateAdapter(
                adapters_pb2.CreateAdapterRequest(
                    name=f"large-{made}", lora={"rank": 512, "alpha": 1, "target_modules": ["all-linear"]}
                )
            )
            made += 1
        except grpc.RpcError as error:
            refusal = refusal_of(error)
            break
    assert (refusal.code, refusal.reason, refusal.field) == (FULL, "QUOTA_ADAPTER_BYTES", "lora")
    mine = [one for one in place.status().adapters if one.name.startswith("red/large")]
    assert len(mine) == made > 0
    assert 4 * sum(one.memory.weights_bytes for one in mine) <= 64 * 2**20
    for one in mine:
        red.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name=one.name.removeprefix("red/")))


LIMITS = {
    "time": (("--stream-idle-seconds", "2"), "nothing was read for 2 s"),
    "messages": (("--stream-idle-seconds", "600", "--kv-slots", "64"), "more than 10000 messages waited"),
}
"""Either limit with the other out of reach: what makes it so, and what is said then."""


@pytest.mark.fault(31, times=3)
@pytest.mark.parametrize("limit", LIMITS)
def test_31_a_client_that_does_not_read_is_ended_and_takes_no_memory(
    make_place: Callable[..., Place], limit: str
) -> None:
    flags, message = LIMITS[limit]
    place = make_place(*flags)
    # A connection that takes little in advance; by default it is some megabytes, which are the client's own.
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
    with grpc.insecure_channel(place.server.address, options=small) as channel:
        stream = Client(channel, place.as_("red").token).inference.Generate(endless(), timeout=200)
        next(stream)
        with place.flat(100 * 2**20):
            place.wait_until(at_rest, 100)  # nothing was read since
        refusal = refused(list, stream)  # its status waits behind a message that had no room, until that is read
    assert (refusal.code, refusal.reason) == (FULL, "SLOW_CONSUMER")
    assert message in refusal.message
    assert place.server.process.poll() is None
