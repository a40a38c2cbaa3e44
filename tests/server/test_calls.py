"""Deadlines and cancels: over the wire to the job, whatever the method."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest
from server.harness import floats, pair, refused, tokens_of

from onebase.server.calls import perform, settle
from onebase.server.errors import Cancelled, FailedPrecondition
from onebase.server.jobs import DescribeAdaptersJob, ForwardBackwardJob, GenerateJob, OptimStepJob, ScoreJob
from onebase.v1 import inference_pb2, sessions_pb2, training_pb2

ONE = [pair((9,), (7,))]


def score(session):
    return inference_pb2.ScoreRequest(session_id=session, rewards=[{"adapter": "r1"}], sequences=ONE)


def forward_backward(session, **more):
    sequence = training_pb2.TrainingSequence(
        sequence=ONE[0], old_logprobs=floats(-1), old_values=floats(0), advantages=floats(1), returns=floats(1)
    )
    return training_pb2.ForwardBackwardRequest(session_id=session, sequences=[sequence], ppo={}, **more)


def optim_step(session, **more):
    return training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1e-3}, **more)


def methods(live, session):
    return {
        "Score": (live.inference.Score, score(session), ScoreJob),
        "ForwardBackward": (live.training.ForwardBackward, forward_backward(session), ForwardBackwardJob),
        "OptimStep": (live.training.OptimStep, optim_step(session, request_id="r"), OptimStepJob),
    }


METHODS = ["Score", "ForwardBackward", "OptimStep"]


@pytest.mark.parametrize("method", METHODS)
def test_a_cancel_reaches_the_job_and_frees_the_session(live, session, method):
    call, request, kind = methods(live, session)[method]
    live.worker.hold(kind)
    future = call.future(request)
    (job,) = live.worker.wait_submitted(kind)
    assert not job.cancelled
    assert live.on_loop(lambda: live.edge.sessions.get(session).in_flight) == 1
    future.cancel()
    live.worker.wait_done(job)
    assert job.cancelled
    assert job not in live.worker.executed
    live.worker.release()
    live.sessions.KeepAlive(sessions_pb2.KeepAliveRequest(session_id=session))
    call(request)  # the loop has seen to the cancelled call by now, and the same call goes through
    assert live.on_loop(lambda: live.edge.sessions.get(session).in_flight) == 0


@pytest.mark.fault(7)
@pytest.mark.parametrize("method", METHODS)
def test_a_deadline_that_passes_in_the_queue_is_never_executed(live, session, method):
    call, request, kind = methods(live, session)[method]
    live.worker.hold(kind)
    refusal = refused(call, request, timeout=0.2)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    (job,) = live.worker.wait_submitted(kind)
    assert job.deadline is not None
    live.worker.wait_done(job)
    assert job not in live.worker.executed


def test_without_a_deadline_there_is_none(live, session):
    live.inference.Score(score(session))
    assert live.worker.executed[-1].deadline is None


def test_a_generate_that_is_cancelled_stops_its_job(live, session):
    live.worker.endless = True
    request = inference_pb2.GenerateRequest(
        session_id=session, prompts=[tokens_of(1)], sampling={"max_new_tokens": 5, "seed": 1}, stream_tokens=True
    )
    stream = live.inference.Generate(request)
    next(stream)
    (job,) = live.worker.wait_submitted(GenerateJob)
    stream.cancel()
    live.worker.wait_done(job)
    assert job.cancelled


def test_the_workers_errors_reach_the_client_as_they_are(live, session):
    live.worker.failures.append(FailedPrecondition("NONFINITE_LOSS", "the loss is nan", field="sequences"))
    refusal = refused(live.training.ForwardBackward, forward_backward(session))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NONFINITE_LOSS",
        "sequences",
    )


@pytest.mark.parametrize("way", [perform, settle])
def test_the_error_of_a_job_that_nobody_waits_for_any_more_troubles_nobody(way):
    """asyncio complains of errors that nobody has looked at when their futures are collected."""
    complaints = []

    class Worker:
        def submit(self, job):
            self.job = job

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        worker = Worker()
        task = asyncio.create_task(way(worker, DescribeAdaptersJob(), None, None))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert worker.job.cancelled
        await asyncio.to_thread(worker.job.done.set_exception, Cancelled("CANCELLED", "gone"))
        with pytest.raises((asyncio.CancelledError, Cancelled)):
            await task
        await asyncio.sleep(0)
        del task, worker
        gc.collect()

    asyncio.run(run())
    assert complaints == []
