from __future__ import annotations

import grpc
import numpy as np
import pytest
from server.fakes import logprobs, values
from server.harness import array, floats, mask, pair, refused

from onebase.server.jobs import (
    AdamW,
    CrossEntropyLoss,
    CustomLoss,
    DpoLoss,
    ForwardBackwardJob,
    ImportanceSamplingLoss,
    OptimStepJob,
    PpoLoss,
    ValueLoss,
)
from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2


def sequence(**more):
    fields = {
        "sequence": pair((9, 8), (7, 6)),
        "old_logprobs": floats(-1, -2),
        "old_values": floats(0.5, 1),
        "advantages": floats(1, -1),
        "returns": floats(2, 3),
        **more,
    }
    return training_pb2.TrainingSequence(**fields)


def forward_backward(session, sequences=None, **more):
    return training_pb2.ForwardBackwardRequest(
        session_id=session, sequences=sequences or [sequence()], **{"ppo": training_pb2.PpoLoss(), **more}
    )


def optim_step(session, **more):
    return training_pb2.OptimStepRequest(session_id=session, **{"adamw": {"learning_rate": 1e-3}, **more})


def test_a_pass_with_everything_given(live, session):
    response = live.training.ForwardBackward(
        forward_backward(
            session,
            [sequence(mask=mask(0, 1)), sequence(sequence=pair((1,), "#5 #6"))],
            ppo={"cliprange": 0.1, "cliprange_value": 0.3, "vf_coef": 0.5, "ratio_threshold": 4},
            denominator=7.5,
            expected_version=0,
        )
    )
    job = live.worker.executed[-1]
    assert job.loss == PpoLoss(0.1, 0.3, 0.5, 4)
    assert (job.denominator, job.expected_version) == (7.5, 0)
    first, second = job.rows
    assert (first.tokens.tolist(), first.start, first.mask.tolist()) == ([9, 8, 7, 6], 2, [False, True])
    assert (second.tokens.tolist(), second.start, second.mask.tolist()) == ([1, 5, 6], 1, [True, True])
    for name, expected in (
        ("old_logprobs", [-1, -2]),
        ("old_values", [0.5, 1]),
        ("advantages", [1, -1]),
        ("returns", [2, 3]),
    ):
        assert getattr(first, name).tolist() == expected
    uid = live.uid("p1")
    np.testing.assert_array_equal(array(response.logprobs[1]), logprobs(uid, second.tokens, 1))
    np.testing.assert_array_equal(array(response.entropy[1]), -logprobs(uid, second.tokens, 1))
    np.testing.assert_array_equal(array(response.values[0]), values(uid, first.tokens, 2))
    assert (response.adapter.name, response.adapter.version, response.pending_gradients) == ("p1", 0, 1)
    assert dict(response.metrics) == {"loss/total": 0.5}


def test_defaults_are_trls(live, session):
    live.training.ForwardBackward(forward_backward(session))
    job = live.worker.executed[-1]
    assert job.loss == PpoLoss(0.2, 0.2, 0.1, 10.0)
    assert (job.denominator, job.expected_version) == (None, None)
    live.training.OptimStep(optim_step(session))
    assert live.worker.executed[-1].adamw == AdamW(1e-3, 0.9, 0.999, 1e-8, 0.0)
    assert live.worker.executed[-1].max_grad_norm == 0


def test_a_step_with_everything_given_makes_the_next_version_which_everybody_sees(live, session):
    live.training.ForwardBackward(forward_backward(session))
    live.training.ForwardBackward(forward_backward(session))
    seen = live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p1"))
    assert (seen.version, seen.pending_gradients) == (0, 2)
    adamw = {"learning_rate": 0, "beta1": 0.0, "beta2": 0.5, "eps": 1e-6, "weight_decay": 0.1}
    response = live.training.OptimStep(optim_step(session, adamw=adamw, max_grad_norm=2, expected_version=0))
    assert live.worker.executed[-1].adamw == AdamW(0, 0.0, 0.5, 1e-6, 0.1)
    assert (response.adapter.version, response.grad_norm, response.gradients_applied) == (1, 1.25, 2)
    seen = live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p1"))
    assert (seen.version, seen.pending_gradients) == (1, 0)


def test_a_stale_version_is_aborted_by_the_worker(live, session):
    for call, request in (
        (live.training.ForwardBackward, forward_backward(session, expected_version=3)),
        (live.training.OptimStep, optim_step(session, expected_version=3)),
    ):
        refusal = refused(call, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH")


def test_without_a_value_loss_no_head_and_no_values_are_needed(live, session):
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=session, name="headless"))
    request = forward_backward(session, adapter="headless")
    refusal = refused(live.training.ForwardBackward, request)
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_VALUE_HEAD",
        "ppo.vf_coef",
    )
    request.ppo.vf_coef = 0
    request.sequences[0].ClearField("old_values")
    request.sequences[0].ClearField("returns")
    live.training.ForwardBackward(request)
    assert live.worker.executed[-1].rows[0].returns is None


def bare(**arrays):
    return training_pb2.TrainingSequence(
        sequence=pair((9, 8), (7, 6)), **{name: floats(*numbers) for name, numbers in arrays.items()}
    )


PPO_ARRAYS = {"old_logprobs": (-1, -2), "advantages": (1, -1), "old_values": (0.5, 1), "returns": (2, 3)}
IMPORTANCE_ARRAYS = {name: PPO_ARRAYS[name] for name in ("old_logprobs", "advantages")}
VALUE_ARRAYS = {name: PPO_ARRAYS[name] for name in ("old_values", "returns")}
REFERENCE = {"reference_logprobs": (-3, -4)}
GRADIENTS = {"logprob_gradients": (1, 2), "value_gradients": (3, 4), "entropy_gradients": (5, 6)}

LOSSES = [
    ({"importance_sampling": {}}, ImportanceSamplingLoss(), IMPORTANCE_ARRAYS),
    ({"cross_entropy": {}}, CrossEntropyLoss(), {}),
    ({"dpo": {}}, DpoLoss(0.1, 0.0), REFERENCE),
    ({"dpo": {"beta": 0.5, "label_smoothing": 0.25}}, DpoLoss(0.5, 0.25), REFERENCE),
    ({"custom": {}}, CustomLoss(), GRADIENTS),
    ({"value": {}}, ValueLoss(0.2), VALUE_ARRAYS),
    ({"value": {"cliprange_value": 0.5}}, ValueLoss(0.5), VALUE_ARRAYS),
    (
        {"ppo": {"cliprange_high": 0.5, "kl_coef": 0.25, "entropy_coef": 0.125}},
        PpoLoss(cliprange_high=0.5, kl_coef=0.25, entropy_coef=0.125),
        {**PPO_ARRAYS, **REFERENCE},
    ),
]


@pytest.mark.parametrize(("given", "loss", "arrays"), LOSSES, ids=lambda case: str(case)[:40])
def test_every_loss_is_read_with_its_arrays(live, session, given, loss, arrays):
    rows = [bare(**arrays, weights=(0.5, -2)), bare(**arrays)]
    live.training.ForwardBackward(training_pb2.ForwardBackwardRequest(session_id=session, sequences=rows, **given))
    job = live.worker.executed[-1]
    assert job.loss == loss
    first, second = job.rows
    for name in (*PPO_ARRAYS, *REFERENCE, *GRADIENTS):
        found = getattr(first, name)
        assert (None if found is None else tuple(found)) == arrays.get(name), name
    assert (first.weights.tolist(), second.weights) == ([0.5, -2], None)


@pytest.mark.parametrize(("given", "loss", "arrays"), LOSSES, ids=lambda case: str(case)[:40])
def test_an_array_that_a_loss_does_not_use_is_refused(live, session, given, loss, arrays):
    for name in {*PPO_ARRAYS, *REFERENCE, *GRADIENTS} - set(arrays):
        rows = [bare(**arrays), bare(**arrays, **{name: (1, 2)})]
        request = training_pb2.ForwardBackwardRequest(session_id=session, sequences=rows, **given)
        refusal = refused(live.training.ForwardBackward, request)
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "UNUSED_FIELD",
            f"sequences[1].{name}",
        )
        assert type(loss).__name__ in refusal.message


@pytest.mark.parametrize(("given", "loss", "arrays"), LOSSES, ids=lambda case: str(case)[:40])
def test_an_array_that_a_loss_needs_is_required(live, session, given, loss, arrays):
    missing = [] if isinstance(loss, CustomLoss) else list(arrays)
    for name in missing:
        rows = [bare(**arrays), bare(**{other: arrays[other] for other in arrays if other != name})]
        request = training_pb2.ForwardBackwardRequest(session_id=session, sequences=rows, **given)
        refusal = refused(live.training.ForwardBackward, request)
        assert (refusal.reason, refusal.field) == ("REQUIRED", f"sequences[1].{name}")
        assert "2 numbers" in refusal.message


def test_the_reference_of_ppo_needs_a_coefficient(live, session):
    refusal = refused(live.training.ForwardBackward, forward_backward(session, [bare(**PPO_ARRAYS, **REFERENCE)]))
    assert (refusal.reason, refusal.field) == ("UNUSED_FIELD", "sequences[0].reference_logprobs")
    assert "ppo.kl_coef" in refusal.message


def custom(session, *rows, **more):
    return training_pb2.ForwardBackwardRequest(session_id=session, sequences=rows, custom={}, **more)


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_custom_loss_needs_one_of_its_derivatives(live, session, name):
    live.training.ForwardBackward(custom(session, bare(**{name: (1, 2)})))
    job = live.worker.executed[-1]
    assert job.count == 1
    assert (job.needs_values, job.needs_entropy_gradient) == (name == "value_gradients", name == "entropy_gradients")
    refusal = refused(live.training.ForwardBackward, custom(session, bare(**{name: (1, 2)}), bare()))
    assert (refusal.reason, refusal.field) == ("REQUIRED", "sequences[1].logprob_gradients")


def test_derivatives_by_values_and_the_value_loss_need_a_head(live, session):
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=session, name="headless"))
    rows = [bare(logprob_gradients=(1, 2)), bare(value_gradients=(1, 2))]
    live.training.ForwardBackward(custom(session, *rows[:1], adapter="headless"))
    values_alone = training_pb2.ForwardBackwardRequest(
        session_id=session, adapter="headless", sequences=[bare(**VALUE_ARRAYS)], value={}
    )
    for request, field in (
        (custom(session, *rows, adapter="headless"), "sequences[1].value_gradients"),
        (values_alone, "value"),
    ):
        refusal = refused(live.training.ForwardBackward, request)
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "NO_VALUE_HEAD",
            field,
        )


def test_a_chosen_sequence_needs_its_rejected_one(live, session):
    request = training_pb2.ForwardBackwardRequest(session_id=session, sequences=[bare(**REFERENCE)] * 3, dpo={})
    refusal = refused(live.training.ForwardBackward, request)
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "UNPAIRED",
        "sequences[2]",
    )
    assert "3 sequences" in refusal.message


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"ppo": {"cliprange_high": 0}}, "ppo.cliprange_high"),
        ({"ppo": {"kl_coef": -1}}, "ppo.kl_coef"),
        ({"ppo": {"entropy_coef": -0.5}}, "ppo.entropy_coef"),
        ({"dpo": {"beta": 0}}, "dpo.beta"),
        ({"dpo": {"label_smoothing": 0.5}}, "dpo.label_smoothing"),
        ({"dpo": {"label_smoothing": -0.1}}, "dpo.label_smoothing"),
        ({"value": {"cliprange_value": -1}}, "value.cliprange_value"),
    ],
    ids=str,
)
def test_settings_out_of_their_range_are_refused(live, session, given, field):
    request = training_pb2.ForwardBackwardRequest(session_id=session, sequences=[bare()] * 2, **given)
    refusal = refused(live.training.ForwardBackward, request)
    assert (refusal.code, refusal.reason, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "OUT_OF_RANGE", field)


def test_a_loss_must_be_named(live, session):
    request = training_pb2.ForwardBackwardRequest(session_id=session, sequences=[bare()])
    refusal = refused(live.training.ForwardBackward, request)
    assert (refusal.reason, refusal.field) == ("REQUIRED", "loss")


@pytest.mark.parametrize("method", ["ForwardBackward", "OptimStep"])
def test_training_needs_the_lease_or_takes_a_free_one(live, session, method):
    request = {"ForwardBackward": forward_backward, "OptimStep": optim_step}[method]
    call = getattr(live.training, method)
    two = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(label="two")).session_id
    submitted = len(live.worker.submitted)
    refusal = refused(call, request(two, adapter="p1"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "NOT_LEASE_HOLDER")
    assert "'one'" in refusal.message
    assert len(live.worker.submitted) == submitted
    live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
    call(request(two, adapter="p1"))
    assert list(live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=two)).leases) == ["p1"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("r1", grpc.StatusCode.FAILED_PRECONDITION),
        ("ref", grpc.StatusCode.FAILED_PRECONDITION),
        ("base", grpc.StatusCode.FAILED_PRECONDITION),
        ("nobody", grpc.StatusCode.NOT_FOUND),
    ],
)
def test_only_policies_are_trained(live, session, name, code):
    for call, request in (
        (live.training.ForwardBackward, forward_backward(session, adapter=name)),
        (live.training.OptimStep, optim_step(session, adapter=name)),
    ):
        refusal = refused(call, request)
        assert (refusal.code, refusal.field) == (code, "adapter")


def test_a_repeated_step_is_made_once(live, session):
    request = optim_step(session, request_id="step 1")
    first = live.training.OptimStep(request)
    assert live.training.OptimStep(request) == first
    assert sum(isinstance(job, OptimStepJob) for job in live.worker.executed) == 1
    refusal = refused(live.training.OptimStep, optim_step(session, request_id="step 1", max_grad_norm=1))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.ABORTED,
        "REQUEST_ID_REUSED",
        "request_id",
    )


def test_the_same_pass_sent_twice_at_once_adds_its_gradients_once(live, session):
    live.worker.hold(ForwardBackwardJob)
    request = forward_backward(session, request_id="pass 1")
    first = live.training.ForwardBackward.future(request)
    live.worker.wait_submitted(ForwardBackwardJob)
    second = live.training.ForwardBackward.future(request)
    live.sessions.KeepAlive(sessions_pb2.KeepAliveRequest(session_id=session))
    first.cancel()
    live.sessions.KeepAlive(sessions_pb2.KeepAliveRequest(session_id=session))
    live.worker.release()
    assert second.result(timeout=20).pending_gradients == 1


def test_a_call_too_late_to_cancel_is_answered_to_its_retry(live, session):
    import threading

    begun, go = threading.Event(), threading.Event()

    def slowly(job):
        if isinstance(job, OptimStepJob):
            begun.set()
            assert go.wait(20)

    live.worker.before = slowly
    request = optim_step(session, request_id="step 1")
    first = live.training.OptimStep.future(request)
    assert begun.wait(20)
    first.cancel()
    job = live.worker.submitted[-1]
    retry = live.training.OptimStep.future(request)
    go.set()
    assert retry.result(timeout=20).adapter.version == 1
    live.worker.wait_done(job)
    assert live.training.OptimStep(request).adapter.version == 1
    assert sum(isinstance(job, OptimStepJob) for job in live.worker.executed) == 1


def test_a_failed_step_is_tried_again(live, session):
    from onebase.server.errors import FailedPrecondition

    live.worker.failures.append(FailedPrecondition("NO_GRADIENTS", "none wait"))
    request = optim_step(session, request_id="step 1")
    assert refused(live.training.OptimStep, request).reason == "NO_GRADIENTS"
    assert live.training.OptimStep(request).adapter.version == 1


def test_request_ids_are_a_sessions_own(live, session):
    two = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=two, name="p2"))
    live.training.OptimStep(optim_step(session, adapter="p1", request_id="1"))
    live.training.OptimStep(optim_step(two, adapter="p2", request_id="1"))
    assert sum(isinstance(job, OptimStepJob) for job in live.worker.executed) == 2
