from __future__ import annotations

import threading
import time
from collections import Counter

import grpc
import numpy as np
import pytest
from server.fakes import FakeWorker
from server.harness import eventually, pair, refusal_of, refused, text_of
from server.tenants import Guarded

from onebase.server.accounts import Bucket
from onebase.server.config import ConfigError, Limits, Quota
from onebase.server.errors import FailedPrecondition, ResourceExhausted, not_there
from onebase.server.flags import quota
from onebase.server.jobs import CreateAdapterJob, GenerateJob, SaveAdapterJob, ScoreJob, ScoreRow
from onebase.server.quotas import QuotaWorker
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


@pytest.mark.fault(11)
def test_what_is_being_read_has_a_place_and_holds_up_its_own_tenant_alone(tmp_path):
    live = served(tmp_path, limits=Limits(max_queued_requests=16), tenant_quota=Quota(requests=2))
    encode = live.parts.text.encode_prompt

    def slowly(text):
        time.sleep(0.05 if text.startswith("long") else 0)
        return encode(text)

    live.parts.text.encode_prompt = slowly

    def ask(client, text):
        sampling = inference_pb2.SamplingParams(max_new_tokens=2)
        request = inference_pb2.GenerateRequest(adapter="base", prompts=[text_of(text)] * 20, sampling=sampling)
        return client.inference.Generate(request)

    with live:
        red, blue = live.as_("red"), live.as_("blue")
        flood = [ask(red, "long") for _ in range(20)]
        time.sleep(0.2)
        began = time.monotonic()
        list(ask(blue, "short"))
        assert time.monotonic() - began < 2.5  # twenty texts, each behind one of red's at the most
        told = Counter(reason_of(one) for one in flood)
        assert set(told) == {"", "QUOTA_REQUESTS"}
        assert told["QUOTA_REQUESTS"] >= 16
        assert list(ask(red, "short"))  # the places were given back
        assert live.edge.worker._reading.total() == live.edge.worker._parties.total() == 0


def reason_of(answers):
    try:
        list(answers)
    except grpc.RpcError as error:
        return refusal_of(error).reason
    return ""


def test_a_request_that_cannot_be_read_gives_its_place_back(tmp_path):
    with served(tmp_path, tenant_quota=Quota(requests=1)) as live:
        red = live.as_("red")
        wrong = inference_pb2.LogprobRequest(adapter="base", sequences=[pair((9, 10**6), (7,))])
        for _ in range(3):
            assert refused(red.inference.Logprob, wrong).code is grpc.StatusCode.INVALID_ARGUMENT
        assert logprob(red).result(timeout=20)


@pytest.mark.fault(10)
def test_adapters_that_are_made_and_written_count_as_requests_of_their_tenant(tmp_path):
    with served(tmp_path, tenant_quota=Quota(requests=4)) as live:
        red, blue = live.as_("red"), live.as_("blue")
        red.adapters.CreateAdapter(Create(name="p"))
        live.worker.hold(SaveAdapterJob)
        download = adapters_pb2.DownloadAdapterRequest(name="p", with_optimizer=True)
        calls = [red.adapters.DownloadAdapter(download) for _ in range(4)]
        live.worker.wait_submitted(SaveAdapterJob, 4)
        refusal = refused(red.adapters.DownloadAdapter, download)
        assert (refusal.reason, refusal.retry_after > 0) == ("QUOTA_REQUESTS", True)
        assert logprob(blue).result(timeout=20)
        live.worker.release()
        assert [len(list(one)) > 0 for one in calls] == [True] * 4
        assert list(red.adapters.DownloadAdapter(download))


def test_who_is_refused_for_others_floods_does_not_pay_for_that(tmp_path):
    with served(tmp_path, quota=Quota(requests=3), tenant_quota=Quota(requests=3)) as live:
        red, blue = live.as_("red"), live.as_("blue")
        live.worker.hold(ScoreJob)
        flood = [logprob(red) for _ in range(3)]
        live.worker.wait_submitted(ScoreJob, 3)
        request = inference_pb2.LogprobRequest(adapter="base", sequences=ONE)
        assert refused(blue.inference.Logprob, request).reason == "QUOTA_REQUESTS"
        assert live.worker.refusals == []
        assert refused(red.inference.Logprob, request).reason == "QUOTA_REQUESTS"
        assert live.worker.refusals == [("red", "")]
        live.worker.release()
        assert [one.result(timeout=20) for one in flood]


def test_a_slow_creation_of_one_tenant_keeps_no_other_waiting(tmp_path):
    quotas = {"tenant_quota": Quota(adapters=2, adapter_bytes=100_000), "quota": Quota(adapter_bytes=7_000)}
    with served(tmp_path, **quotas) as live:
        red, blue = live.as_("red"), live.as_("blue")
        live.worker.before = lambda job: job.tenant == "red" and isinstance(job, CreateAdapterJob) and go.wait(20)
        go = threading.Event()
        live.worker.hold(CreateAdapterJob)
        slow = red.adapters.CreateAdapter.future(Create(name="a"))
        live.worker.wait_submitted(CreateAdapterJob)
        quick = blue.adapters.CreateAdapter.future(Create(name="a"))
        live.worker.wait_submitted(CreateAdapterJob, 2)
        go.set()
        live.worker.release()
        # Both were let in for what was left; whoever is done second finds it taken, and leaves nothing.
        errors = [one.exception(timeout=20) for one in (slow, quick)]
        assert [error is None for error in errors].count(True) == 1
        refusal = refusal_of(next(error for error in errors if error is not None))
        assert refusal.reason == "QUOTA_ADAPTER_BYTES"
        eventually(lambda: len(live.worker.adapters) == 1)


def test_a_creation_that_fails_gives_back_what_was_booked_for_it(tmp_path):
    with served(tmp_path, tenant_quota=Quota(adapters=1)) as live:
        red = live.as_("red")
        live.worker.failures.append(FailedPrecondition("NO", "not now"))
        assert refused(red.adapters.CreateAdapter, Create(name="a")).reason == "NO"
        red.adapters.CreateAdapter(Create(name="a"))
        assert refused(red.adapters.CreateAdapter, Create(name="b")).reason == "QUOTA_ADAPTERS"


def test_tokens_are_counted_once_however_often_a_call_looks_what_its_names_mean():
    class Worker(FakeWorker):
        def submit(self, job):
            job.done.set_exception(not_there())

        def check(self, session):
            pass

    quotas = QuotaWorker(Worker(), Quota(tokens_per_second=10), Quota())
    for _ in range(8):
        quotas.submit(ScoreJob(rows=[ScoreRow(1, np.arange(30))]))
    live = ScoreJob(rows=[ScoreRow(1, np.arange(30))])
    quotas._worker = FakeWorker()
    quotas.submit(live)
    with pytest.raises(ResourceExhausted):
        quotas.submit(ScoreJob(rows=[ScoreRow(1, np.arange(30))]))
