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


def test_a_row_is_sent_array_by_array():
    (sent,) = forward_backward(row(mask=np.array([True]))).request.sequences

    told = [getattr(sent, name).data for name in ("old_logprobs", "old_values", "advantages", "returns")]
    assert told == [np.float32(number).tobytes() for number in (-1, 2, 3, 4)]
    assert (sent.mask.dtype, sent.mask.data) == (types_pb2.DTYPE_BOOL, b"\1")
    assert (sent.sequence.prompt.tokens.data, sent.sequence.completion.tokens.data) == (b"\1\0\0\0", b"\2\0\0\0")


def test_what_is_not_given_is_unset():
    request = forward_backward([row()]).request

    assert not request.HasField("denominator")
    assert not request.HasField("expected_version")
    assert not request.sequences[0].HasField("mask")


def test_a_loss_is_sent_with_its_zeros():
    request = forward_backward(row(), t.PpoLoss(0.0, 0.0, 0.0, 0.0), denominator=0.5).request

    assert all(request.ppo.HasField(name) for name in vars(t.PpoLoss()))
    assert request.denominator == 0.5


@pytest.mark.parametrize("name", ["old_logprobs", "old_values", "advantages", "returns"])
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
        values=[floats(1, 2), floats(3)],
        ratio_threshold_exceeded=True,
        pending_gradients=2,
    )

    result = forward_backward(row()).read(response)

    assert (result.adapter, result.metrics) == (t.AdapterVersion("a", 3), {"loss/policy": 0.5, "loss/total": 0.75})
    assert [array.tolist() for array in (*result.logprobs, *result.values)] == [[-1, -2], [-3], [1, 2], [3]]
    assert (result.ratio_threshold_exceeded, result.pending_gradients) == (True, 2)


def test_adamw_is_sent_field_by_field():
    given = t.AdamW(0.5, 0.0, 0.25, 0.125, 0.75)

    sent = training.optim_step(given, max_grad_norm=0.0, **NAMED).request.adamw

    assert sent.HasField("beta1")
    assert {name: getattr(sent, name) for name in vars(given)} == vars(given)


def test_a_learning_rate_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"adamw\.learning_rate='1e-5'"):
        training.optim_step(t.AdamW("1e-5"), max_grad_norm=0.0, **NAMED)
