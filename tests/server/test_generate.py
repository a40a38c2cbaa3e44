from __future__ import annotations

import grpc
import numpy as np
import pytest
from server.harness import array, refusal_of, refused, text_of, tokens_of

from onebase.server.errors import ResourceExhausted
from onebase.server.jobs import GenerateJob
from onebase.v1 import adapters_pb2, inference_pb2, training_pb2


def request(**more):
    sampling = {"max_new_tokens": 3, "seed": 5, **more.pop("sampling", {})}
    fields = {"adapter": "p1", "prompts": [tokens_of(10, 20)], "sampling": sampling, **more}
    return inference_pb2.GenerateRequest(**fields)


def test_every_message_says_where_it_belongs(live, session):
    live.training.OptimStep(training_pb2.OptimStepRequest(session_id=session, adamw={"learning_rate": 1}))
    messages = list(
        live.inference.Generate(
            request(session_id=session, adapter="", prompts=[tokens_of(10, 20), text_of("#7")], sampling={"n": 2})
        )
    )
    assert len(messages) == 2 * 2 * 3
    for start, (prompt, index) in zip(range(0, 12, 3), [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        total = (30, 8)[prompt]
        for i, message in enumerate(messages[start : start + 3]):
            token = total + 5 + index + i
            assert (message.prompt_index, message.completion_index) == (prompt, index)
            np.testing.assert_array_equal(array(message.tokens), [token])
            assert message.text == f"<{token}>"
            assert (message.adapter.name, message.adapter.version) == ("p1", 1)
            assert (message.seed, message.prompt_tokens) == (5, 2)
            assert message.finish_reason == (inference_pb2.FINISH_REASON_LENGTH if i == 2 else 0)
            assert not message.HasField("logprobs")
            assert not message.HasField("values")


def test_the_job_has_what_was_asked_for(live):
    sampling = {
        "temperature": 0.0,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.1,
        "stop": ["ab", "c"],
        "stop_token_ids": [9, 0],
        "ignore_eos": True,
        "min_new_tokens": 2,
        "seed": -3,
    }
    list(live.inference.Generate(request(sampling=sampling, adapter_version=0, stream_tokens=True)))
    job = live.worker.executed[-1]
    for name, value in sampling.items():
        assert getattr(job.sampling, name) == (tuple(value) if isinstance(value, list) else value)
    assert (job.n, job.version, job.stream_tokens, job.return_logprobs, job.return_values) == (1, 0, True, False, False)


def test_defaults(live):
    bare = inference_pb2.SamplingParams(max_new_tokens=1)
    message = inference_pb2.GenerateRequest(adapter="base", prompts=[tokens_of(1)], sampling=bare)
    (answer,) = live.inference.Generate(message)
    sampling = live.worker.executed[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos, sampling.min_new_tokens) == ((), (), False, 0)
    assert live.worker.executed[-1].version is None
    assert answer.adapter.name == "base"


def test_an_unset_seed_is_drawn_each_time_and_told_and_0_is_a_seed(live):
    message = request()
    message.sampling.ClearField("seed")
    seeds = {next(iter(live.inference.Generate(message))).seed for _ in range(4)}
    assert len(seeds) == 4
    assert live.worker.executed[-1].sampling.seed in seeds
    assert next(iter(live.inference.Generate(request(sampling={"seed": 0})))).seed == 0


def test_logprobs_and_values_when_asked_for(live):
    messages = list(live.inference.Generate(request(return_logprobs=True, return_values=True)))
    for message in messages:
        np.testing.assert_array_equal(array(message.logprobs), np.float32([-0.5]))
        np.testing.assert_array_equal(array(message.values), np.float32([0.25]))


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"adapter": "r1"}, grpc.StatusCode.FAILED_PRECONDITION, "WRONG_ADAPTER_KIND"),
        ({"adapter": "nobody"}, grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        ({"adapter": ""}, grpc.StatusCode.INVALID_ARGUMENT, "REQUIRED"),
        ({"adapter": "base", "return_values": True}, grpc.StatusCode.FAILED_PRECONDITION, "NO_VALUE_HEAD"),
        ({"adapter": "base", "adapter_version": 1}, grpc.StatusCode.ABORTED, "VERSION_MISMATCH"),
        ({"adapter_version": 8}, grpc.StatusCode.ABORTED, "VERSION_MISMATCH"),
        ({"session_id": "f" * 32}, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"),
    ],
)
def test_what_is_refused_before_the_first_message(live, changes, code, reason):
    refusal = refused(live.inference.Generate, request(**changes))
    assert (refusal.code, refusal.reason) == (code, reason)


def test_a_reference_generates_too(live):
    assert next(iter(live.inference.Generate(request(adapter="ref")))).adapter.name == "ref"


def ending(stream):
    """Reads a stream that ends with an error: how many messages came, and what the client is told."""
    count = 0
    try:
        for _ in stream:
            count += 1
    except grpc.RpcError as error:
        return count, refusal_of(error)
    raise AssertionError("no error came")


def test_who_does_not_read_is_cut_off_and_told(live):
    live.worker.endless = True
    stream = live.inference.Generate(request(stream_tokens=True))
    (job,) = live.worker.wait_submitted(GenerateJob)
    live.worker.wait_done(job)  # it was dropped, with its client still there and reading nothing
    assert job.cancelled
    count, refusal = ending(stream)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
    assert count < 10**5


def test_an_error_in_the_middle_ends_the_stream_with_its_status(live, monkeypatch):
    write = live.worker._GenerateJob

    def fail_late(job):
        write(job)
        raise ResourceExhausted("OUT_OF_MEMORY", "too long", retry_after=2)

    monkeypatch.setattr(live.worker, "_GenerateJob", fail_late)
    count, refusal = ending(live.inference.Generate(request()))
    assert count == 3
    assert (refusal.code, refusal.reason, refusal.retry_after) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "OUT_OF_MEMORY",
        2,
    )


def test_a_completion_under_way_outlives_its_adapters_name(live):
    live.worker.hold(GenerateJob)
    stream = live.inference.Generate(request())
    live.worker.wait_submitted(GenerateJob)
    job = live.worker.submitted[-1]
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="other"))
    live.worker.release()
    assert [array(message.tokens)[0] for message in stream] == [35, 36, 37]
    assert job.adapter == live.uid("p1")
