"""TrainingService: gradients accumulate, then one optimizer step makes the next version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from google.protobuf.message import Message

from onebase.client import types as t
from onebase.client.codec.rpc import Call, Rpc
from onebase.client.codec.values import (
    as_list,
    build,
    decode_array,
    decode_version,
    encode_floats,
    encode_mask,
    encode_sequence,
)
from onebase.v1 import training_pb2 as pb
from onebase.v1 import types_pb2

FORWARD_BACKWARD = Rpc(
    "TrainingService/ForwardBackward", pb.ForwardBackwardRequest, pb.ForwardBackwardResponse, repeatable=True
)
OPTIM_STEP = Rpc("TrainingService/OptimStep", pb.OptimStepRequest, pb.OptimStepResponse, repeatable=True)

_LOSSES: Mapping[type[t.Loss], tuple[str, type[Message]]] = {
    t.PpoLoss: ("ppo", pb.PpoLoss),
    t.ImportanceSamplingLoss: ("importance_sampling", pb.ImportanceSamplingLoss),
    t.CrossEntropyLoss: ("cross_entropy", pb.CrossEntropyLoss),
    t.DpoLoss: ("dpo", pb.DpoLoss),
    t.CustomLoss: ("custom", pb.CustomLoss),
    t.ValueLoss: ("value", pb.ValueLoss),
}
_ARRAYS = (
    "old_logprobs",
    "old_values",
    "advantages",
    "returns",
    "reference_logprobs",
    "weights",
    "logprob_gradients",
    "value_gradients",
    "entropy_gradients",
)


def forward_backward(
    sequences: t.TrainingSequence | Iterable[t.TrainingSequence],
    loss: t.Loss,
    *,
    adapter: str,
    denominator: float | None,
    expected_version: int | None,
    expected_pending: int | None = None,
    session_id: str,
    request_id: str,
) -> Call[t.ForwardBackward]:
    """ForwardBackward."""
    request = build(
        pb.ForwardBackwardRequest,
        session_id=session_id,
        request_id=request_id,
        adapter=adapter,
        expected_version=expected_version,
        expected_pending=expected_pending,
        sequences=[_encode_row(row, f"sequences[{i}]") for i, row in enumerate(as_list(sequences, t.TrainingSequence))],
        denominator=denominator,
        **_encode_loss(loss),
    )
    return FORWARD_BACKWARD.call(request, _read_forward_backward)


def _encode_loss(loss: t.Loss) -> dict[str, Message]:
    """The loss's field of a request; TypeError if it is none."""
    if type(loss) not in _LOSSES:
        names = ", ".join(kind.__name__ for kind in _LOSSES)
        raise TypeError(f"loss must be one of {names}, not {loss!r}")
    name, message = _LOSSES[type(loss)]
    return {name: build(message, "loss.", **vars(loss))}


def _encode_row(row: t.TrainingSequence, where: str) -> pb.TrainingSequence:
    def encoded(name: str) -> types_pb2.Tensor | None:
        numbers: t.Floats | None = getattr(row, name)
        return None if numbers is None else encode_floats(numbers, f"{where}.{name}")

    return pb.TrainingSequence(
        sequence=encode_sequence(row, where),
        mask=None if row.mask is None else encode_mask(row.mask, f"{where}.mask"),
        **{name: encoded(name) for name in _ARRAYS},
    )


def _read_forward_backward(response: pb.ForwardBackwardResponse) -> t.ForwardBackward:
    return t.ForwardBackward(
        adapter=decode_version(response.adapter),
        metrics=dict(response.metrics),
        logprobs=tuple(decode_array(tensor, np.float32) for tensor in response.logprobs),
        entropy=tuple(decode_array(tensor, np.float32) for tensor in response.entropy),
        values=tuple(decode_array(tensor, np.float32) for tensor in response.values),
        ratio_threshold_exceeded=response.ratio_threshold_exceeded,
        pending_gradients=response.pending_gradients,
    )


def optim_step(
    adamw: t.AdamW,
    *,
    max_grad_norm: float,
    adapter: str,
    expected_version: int | None,
    expected_pending: int | None = None,
    client_state: bytes | None = None,
    session_id: str,
    request_id: str,
) -> Call[t.OptimStep]:
    """OptimStep."""
    request = build(
        pb.OptimStepRequest,
        session_id=session_id,
        request_id=request_id,
        adapter=adapter,
        expected_version=expected_version,
        expected_pending=expected_pending,
        adamw=build(pb.AdamW, "adamw.", **vars(adamw)),
        max_grad_norm=max_grad_norm,
        client_state=client_state,
    )
    return OPTIM_STEP.call(request, _read_optim_step)


def _read_optim_step(response: pb.OptimStepResponse) -> t.OptimStep:
    return t.OptimStep(
        adapter=decode_version(response.adapter),
        grad_norm=response.grad_norm,
        gradients_applied=response.gradients_applied,
    )
