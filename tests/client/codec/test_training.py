from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
from client.wire import floats, version

from onebase.client import types as t
from onebase.client.codec import training
from onebase.v1 import training_pb2 as pb
from onebase.v1 import types_pb2

NAMED = {"session_id": "s", "request_id": "r", "adapter": "a", "expected_version": None}


def forward_backward(rows, loss=t.PpoLoss(), denominator=None):  # noqa: B008
    return training.forward_backward(rows, loss, denominator=denominator, **NAMED)


def row(**changes):
    arrays = {"old_logprobs": [-1.0], "old_values": [2.0], "advantages": [3.0], "returns": [4.0]}
    return t.TrainingSequence(**{"prompt": [1], "completion": [2], **arrays, **changes})


ARRAYS = [field.name for field in fields(t.TrainingSequence) if field.name not in ("prompt", "completion", "mask")]


def test_a_row_is_sent_array_by_array():
    numbers = {name: [float(number)] for number, name in enumerate(ARRAYS)}

    (sent,) = forward_backward(row(**numbers, mask=np.array([True]))).request.sequences

    assert [getattr(sent, name).data for name in ARRAYS] == [np.float32(i).tobytes() for i in range(len(ARRAYS))]
    assert (sent.mask.dtype, sent.mask.data) == (types_pb2.DTYPE_BOOL, b"\1")
    assert (sent.sequence.prompt.tokens.data, sent.sequence.completion.tokens.data) == (b"\1\0\0\0", b"\2\0\0\0")
    assert {"sequence", "mask", *ARRAYS} == set(pb.TrainingSequence.DESCRIPTOR.fields_by_name)


def test_what_is_not_given_is_unset():
    request = forward_backward([row()]).request

    assert not request.HasField("denominator")
    assert not request.HasField("expected_version")
    assert not request.sequences[0].HasField("mask")
    bare = forward_backward(t.TrainingSequence([1], [2])).request.sequences[0]
    assert [field.name for field, _ in bare.ListFields()] == ["sequence"]
    assert not request.ppo.HasField("cliprange_high")


def test_a_loss_is_sent_with_its_zeros():
    request = forward_backward(row(), t.PpoLoss(0.0, 0.0, 0.0, 0.0, 0.0), denominator=0.5).request

    zeros = ("cliprange", "cliprange_value", "vf_coef", "ratio_threshold", "cliprange_high")
    assert all(request.ppo.HasField(name) for name in zeros)
    assert request.denominator == 0.5


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (t.PpoLoss(0.5, 0.25, 0.125, 8.0, 0.75, 2.0, 4.0), "ppo"),
        (t.ImportanceSamplingLoss(), "importance_sampling"),
        (t.CrossEntropyLoss(), "cross_entropy"),
        (t.DpoLoss(0.5, 0.25), "dpo"),
        (t.CustomLoss(), "custom"),
        (t.ValueLoss(0.5), "value"),
    ],
)
def test_every_loss_is_sent_field_by_field(loss, name):
    request = forward_backward(row(), loss).request

    assert request.WhichOneof("loss") == name
    sent = getattr(request, name)
    assert {field: getattr(sent, field) for field in sent.DESCRIPTOR.fields_by_name} == vars(loss)


def test_the_losses_are_those_of_the_contract():
    known = {name for name, _ in training._LOSSES.values()}
    assert known == {field.name for field in pb.ForwardBackwardRequest.DESCRIPTOR.oneofs_by_name["loss"].fields}
    assert set(training._LOSSES) == set(get_args(t.Loss))


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match=r"loss must be one of PpoLoss, .*CustomLoss.*, not AdamW"):
        forward_backward(row(), t.AdamW(1.0))


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_cannot_be_encoded_is_named(name):
    with pytest.raises(ValueError, match=rf"sequences\[1\]\.{name} must have one dimension, not 2"):
        forward_backward([row(), row(**{name: [[1.0]]})])


def test_a_plain_sequence_cannot_be_trained_on():
    with pytest.raises(TypeError, match=r"sequences\[0\] must be a TrainingSequence, not Sequence"):
        forward_backward([t.Sequence([1], [2])])


def test_a_pass_is_read():
    response = pb.ForwardBackwardResponse(
        adapter=version("a", 3),
        metrics={"loss/policy": 0.5, "loss/total": 0.75},
        logprobs=[floats(-1, -2), floats(-3)],
        entropy=[floats(5, 6), floats(7)],
        values=[floats(1, 2), floats(3)],
        ratio_threshold_exceeded=True,
        pending_gradients=2,
    )

    result = forward_backward(row()).read(response)

    assert (result.adapter, result.metrics) == (t.AdapterVersion("a", 3), {"loss/policy": 0.5, "loss/total": 0.75})
    assert [array.tolist() for array in (*result.logprobs, *result.values)] == [[-1, -2], [-3], [1, 2], [3]]
    assert [array.tolist() for array in result.entropy] == [[5, 6], [7]]
    assert (result.ratio_threshold_exceeded, result.pending_gradients) == (True, 2)


def test_adamw_is_sent_field_by_field():
    given = t.AdamW(0.5, 0.0, 0.25, 0.125, 0.75)

    sent = training.optim_step(given, max_grad_norm=0.0, **NAMED).request.adamw

    assert sent.HasField("beta1")
    assert {name: getattr(sent, name) for name in vars(given)} == vars(given)


def test_a_learning_rate_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"adamw\.learning_rate='1e-5'"):
        training.optim_step(t.AdamW("1e-5"), max_grad_norm=0.0, **NAMED)
