"""TrainingService: gradients accumulate, then one optimizer step makes the next version."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

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

FORWARD_BACKWARD = Rpc(
    "TrainingService/ForwardBackward", pb.ForwardBackwardRequest, pb.ForwardBackwardResponse, repeatable=True
)
OPTIM_STEP = Rpc("TrainingService/OptimStep", pb.OptimStepRequest, pb.OptimStepResponse, repeatable=True)


def forward_backward(
    sequences: t.TrainingSequence | Iterable[t.TrainingSequence],
    loss: t.PpoLoss,
    *,
    adapter: str,
    denominator: float | None,
    expected_version: int | None,
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
        sequences=[_encode_row(row, f"sequences[{i}]") for i, row in enumerate(as_list(sequences, t.TrainingSequence))],
        ppo=build(pb.PpoLoss, "loss.", **vars(loss)),
        denominator=denominator,
    )
    return FORWARD_BACKWARD.call(request, _read_forward_backward)


def _encode_row(row: t.TrainingSequence, where: str) -> pb.TrainingSequence:
    return pb.TrainingSequence(
        sequence=encode_sequence(row, where),
        old_logprobs=encode_floats(row.old_logprobs, f"{where}.old_logprobs"),
        old_values=encode_floats(row.old_values, f"{where}.old_values"),
        advantages=encode_floats(row.advantages, f"{where}.advantages"),
        returns=encode_floats(row.returns, f"{where}.returns"),
        mask=None if row.mask is None else encode_mask(row.mask, f"{where}.mask"),
    )


def _read_forward_backward(response: pb.ForwardBackwardResponse) -> t.ForwardBackward:
    return t.ForwardBackward(
        adapter=decode_version(response.adapter),
        metrics=dict(response.metrics),
        logprobs=tuple(decode_array(tensor, np.float32) for tensor in response.logprobs),
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
        adamw=build(pb.AdamW, "adamw.", **vars(adamw)),
        max_grad_norm=max_grad_norm,
    )
    return OPTIM_STEP.call(request, _read_optim_step)


def _read_optim_step(response: pb.OptimStepResponse) -> t.OptimStep:
    return t.OptimStep(
        adapter=decode_version(response.adapter),
        grad_norm=response.grad_norm,
        gradients_applied=response.gradients_applied,
    )
