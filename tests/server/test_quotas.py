from __future__ import annotations

import time

import grpc
import pytest
from server.fakes import FakeWorker
from server.harness import pair, refused, text_of
from server.tenants import Guarded

from onebase.server.config import ConfigError, Limits, Quota
from onebase.server.flags import quota
from onebase.server.jobs import CreateAdapterJob, GenerateJob, ScoreJob
from onebase.server.quotas import Bucket
from onebase.v1 import adapters_pb2, inference_pb2

ONE = [pair((9,), (7,))]
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
Create = adapters_pb2.CreateAdapterRequest


def logprob(client, sequences=ONE):
    return client.inference.Logprob.future(inference_pb2.LogprobRequest(adapter="base", sequences=sequences))


def served(tmp_path, **config):
    return Guarded(tmp_path, **config)


@pytest.mark.fault(10, 11)
def test_a_tenant_that_floods_is_refused_and_the_others_are_served(tmp_path):
    with served(tmp_path, limits=Limits(max_queued_requests=16)) as live:
        red, blue = live.as_("red"), live.as_("blue")
        live.worker.hold(ScoreJob)
        flood = [logprob(red) for _ in range(20)]
        live.worker.wait_submitted(ScoreJob, 4)
        refusal = refused(red.inference.Logprob, inference_pb2.LogprobRequest(adapter="base", sequences=ONE))
        assert (refusal.code, refusal.reason) == (FULL, "QUOTA_REQUESTS")
        assert refusal.retry_after > 0
        fine = logprob(blue)
        live.worker.wait_submitted(ScoreJob, 5)
        live.worker.release()
        assert fine.result(timeout=20)
        done = [one.exception(timeout=20) for one in flood]
        assert done.count(None) == 4  # a quarter of the queue
        assert logprob(red).result(timeout=20)  # and when they are done there is room again


@pytest.mark.fault(10)
def test_completions_are_counted_while_they_run(tmp_path):
    def ask(client, n):
        sampling = {"max_new_tokens": 2, "n": n}
        return inference_pb2.GenerateRequest(adapter="base", prompts=[text_of("a"), text_of("b")], sampling=sampling)

    with served(tmp_path, tenant_quota=Quota(completions=8)) as live:
        red = live.as_("red")
        absurd = refused(red.inference.Generate, ask(red, 5))
        assert (absurd.code, absurd.reason, absurd.retry_after) == (FULL, "QUOTA_COMPLETIONS", None)
        live.worker.hold(GenerateJob)
        first = red.inference.Generate(ask(red, 3))
        live.worker.wait_submitted(GenerateJob)
        refusal = refused(red.inference.Generate, ask(red, 2))
        assert (refusal.reason, refusal.retry_after > 0) == ("QUOTA_COMPLETIONS", True)
        second = live.as_("blue").inference.Generate(ask(red, 4))
        live.worker.wait_submitted(GenerateJob, 2)
        live.worker.release()
        assert len(list(first)) == 12
        assert len(list(second)) == 16
        assert len(list(red.inference.Generate(ask(red, 4)))) == 16


@pytest.mark.fault(10)
def test_the_whole_is_bounded_too(tmp_path):
    with served(tmp_path, quota=Quota(requests=2)) as live:
        live.worker.hold(ScoreJob)
        running = [logprob(live.as_(tenant)) for tenant in ("red", "blue")]
        live.worker.wait_submitted(ScoreJob, 2)
        request = inference_pb2.LogprobRequest(adapter="base", sequences=ONE)
        refusal = refused(live.as_("green").inference.Logprob, request)
        assert (refusal.reason, "all clients together" in refusal.message) == ("QUOTA_REQUESTS", True)
        live.worker.release()
        assert [one.result(timeout=20) for one in running]


def test_a_bucket_says_exactly_when_it_has_tokens_again():
    now = [100.0]
    bucket = Bucket(10.0, lambda: now[0])
    assert bucket.wait() == 0
    bucket.take(25)
    wait = bucket.wait()
    assert wait == pytest.approx(1.5, abs=0.01)
    now[0] += wait * 0.99
    assert bucket.wait() > 0
    now[0] += wait * 0.01 + 1e-9
    assert bucket.wait() == 0
    now[0] += 1000
    bucket.take(10)
    assert bucket.wait() > 0  # what was not used for long is not saved up


@pytest.mark.fault(10)
def test_tokens_a_second(tmp_path):
    many = [pair(tuple(range(1, 31)), (7,))]
    with served(tmp_path, tenant_quota=Quota(tokens_per_second=10)) as live:
        red = live.as_("red")
        assert logprob(red, many).result(timeout=20)
        refusal = refused(red.inference.Logprob, inference_pb2.LogprobRequest(adapter="base", sequences=ONE))
        assert (refusal.code, refusal.reason) == (FULL, "QUOTA_TOKENS_PER_SECOND")
        assert 1 < refusal.retry_after < 2.2
        assert logprob(live.as_("blue"), many).result(timeout=20)


def test_who_waits_as_long_as_it_is_told_has_tokens_again(tmp_path):
    with served(tmp_path, tenant_quota=Quota(tokens_per_second=40)) as live:
        red = live.as_("red")
        request = inference_pb2.LogprobRequest(adapter="base", sequences=[pair(tuple(range(1, 60)), (7,))])
        red.inference.Logprob(request)
        for _ in range(5):
            refusal = refused(red.inference.Logprob, request)
            assert refusal.reason == "QUOTA_TOKENS_PER_SECOND"
            time.sleep(refusal.retry_after)
            red.inference.Logprob(request)  # and not a moment before: it is refused again at once


def test_a_full_queue_says_when_there_is_room(tmp_path):
    """Of the worker's own refusals too: the first of the work under way takes as long as such work took."""
    with served(tmp_path, worker=FakeWorker(room=2)) as live:
        red = live.as_("red")
        live.worker.before = lambda job: time.sleep(0.4)
        for _ in range(3):
            logprob(red).result(timeout=20)
        running = [logprob(red) for _ in range(2)]
        live.worker.wait_submitted(ScoreJob, 5)
        refusal = refused(red.inference.Logprob, inference_pb2.LogprobRequest(adapter="base", sequences=ONE))
        assert refusal.reason == "QUEUE_FULL"
        assert 0.05 <= refusal.retry_after < 2
        assert refusal.retry_after != 0.25  # what the worker, which knows no past, would have said
        assert [one.result(timeout=20) for one in running]


def test_adapters_are_counted_by_tenant(tmp_path):
    with served(tmp_path, tenant_quota=Quota(adapters=2)) as live:
        red = live.as_("red")
        for name in ("a", "b"):
            red.adapters.CreateAdapter(Create(name=name))
        refusal = refused(red.adapters.CreateAdapter, Create(name="c"))
        assert (refusal.code, refusal.reason) == (FULL, "QUOTA_ADAPTERS")
        assert len(live.worker.wait_submitted(CreateAdapterJob)) == 2
        live.as_("blue").adapters.CreateAdapter(Create(name="a"))
        red.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="a"))
        red.adapters.CreateAdapter(Create(name="c"))


def test_two_that_come_at_once_do_not_both_take_the_last_place(tmp_path):
    with served(tmp_path, quota=Quota(adapters=1)) as live:
        live.worker.hold(CreateAdapterJob)
        calls = [live.as_(tenant).adapters.CreateAdapter.future(Create(name="a")) for tenant in ("red", "blue")]
        live.worker.wait_submitted(CreateAdapterJob)
        live.worker.release()
        assert sorted(one.exception(timeout=20) is None for one in calls) == [False, True]


def test_what_is_left_of_the_bytes_goes_with_the_job(tmp_path):
    with served(tmp_path, tenant_quota=Quota(adapter_bytes=10_000)) as live:
        red = live.as_("red")
        for name in ("a", "b"):
            red.adapters.CreateAdapter(Create(name=name))
        live.as_("blue").adapters.CreateAdapter(Create(name="a"))
        # An adapter of the fake has 250 parameters: 1,000 bytes, and as much three times more to train it.
        jobs = live.worker.wait_submitted(CreateAdapterJob, 3)
        assert [job.max_bytes for job in jobs] == [10_000, 6_000, 10_000]


def test_a_quota_is_read_from_the_command_line():
    assert quota("--quota", "") == Quota()
    assert quota("--quota", "adapters=8,adapter_bytes=2G,tokens_per_second=100") == Quota(
        adapters=8, adapter_bytes=2 * 2**30, tokens_per_second=100
    )
    for wrong in ("adapters", "adapters=x", "adapter=1", "adapters=1,adapters=2", "adapters=-1", "adapters=1KK"):
        with pytest.raises(ConfigError, match="--quota is"):
            quota("--quota", wrong)
