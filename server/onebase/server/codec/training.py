"""ForwardBackward and OptimStep: their requests as jobs, and the results as responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onebase.server.codec.fields import finite, number, optional, out_of_range, required, version
from onebase.server.codec.losses import check_adapter, check_pairs, read_arrays, read_loss
from onebase.server.codec.sequences import Pair, SequenceReader
from onebase.server.codec.tensors import float_tensor, read_mask
from onebase.server.jobs import (
    MAX_CLIENT_STATE,
    AdamW,
    ForwardBackwardJob,
    ForwardBackwardResult,
    Loss,
    OptimStepJob,
    OptimStepResult,
    TrainRow,
)
from onebase.server.registry import Entry
from onebase.v1 import adapters_pb2, training_pb2, types_pb2

_ADAMW = AdamW(learning_rate=0.0)

_MOST_RATE = 1e3
"""Largest learning rate. AdamW moves every weight by about so much, and an adapter's weights are below one: more is a
slip, as 1e5 for 1e-5. Where eps is above one it divides the steps, and the rate may be as much larger."""


async def read_forward_backward(
    request: training_pb2.ForwardBackwardRequest, entry: Entry, reader: SequenceReader
) -> ForwardBackwardJob:
    """Checks a request of ForwardBackward whose policy is known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_VALUE_HEAD where the loss needs one; WRONG_ADAPTER_KIND for a policy's loss and a critic.
    """
    expected_version = version(request, "expected_version")
    loss = read_loss(request)
    check_adapter(entry, loss, request.sequences)
    check_pairs(loss, len(request.sequences))
    denominator = None
    if request.HasField("denominator"):
        denominator = number(request.denominator, "denominator", above=0)
    fields = [f"sequences[{index}].sequence" for index in range(len(request.sequences))]
    pairs = await reader.pairs([one.sequence for one in request.sequences], fields)
    return ForwardBackwardJob(
        adapter=entry.uid,
        rows=_read_rows(request.sequences, pairs, loss),
        loss=loss,
        denominator=denominator,
        expected_version=expected_version,
        expected_pending=_pending(request),
    )


def read_optim_step(request: training_pb2.OptimStepRequest, entry: Entry) -> OptimStepJob:
    """Checks a request of OptimStep whose policy is known.

    Raises:
        InvalidArgument: naming the field.
    """
    if not request.HasField("adamw"):
        raise required("adamw", "give at least its learning_rate")
    given = request.adamw
    eps = number(optional(given, "eps", _ADAMW.eps), "adamw.eps", above=0)
    adamw = AdamW(
        learning_rate=_rate(given.learning_rate, eps),
        beta1=_beta(given, "beta1", _ADAMW.beta1),
        beta2=_beta(given, "beta2", _ADAMW.beta2),
        eps=eps,
        weight_decay=number(given.weight_decay, "adamw.weight_decay", least=0),
    )
    return OptimStepJob(
        adapter=entry.uid,
        adamw=adamw,
        max_grad_norm=number(request.max_grad_norm, "max_grad_norm", least=0),
        expected_version=version(request, "expected_version"),
        expected_pending=_pending(request),
        client_state=read_client_state(request),
    )


def forward_backward_response(name: str, result: ForwardBackwardResult) -> training_pb2.ForwardBackwardResponse:
    """What a pass over the policy of that name gave."""
    return training_pb2.ForwardBackwardResponse(
        adapter=types_pb2.AdapterVersion(name=name, version=result.version),
        metrics=result.metrics,
        logprobs=[float_tensor(one) for one in result.logprobs],
        values=[float_tensor(one) for one in result.values],
        entropy=[float_tensor(one) for one in result.entropy],
        ratio_threshold_exceeded=result.ratio_threshold_exceeded,
        pending_gradients=result.facts.pending_gradients,
    )


def optim_step_response(name: str, result: OptimStepResult) -> training_pb2.OptimStepResponse:
    """What a step of the policy of that name gave."""
    return training_pb2.OptimStepResponse(
        adapter=types_pb2.AdapterVersion(name=name, version=result.version),
        grad_norm=result.grad_norm,
        gradients_applied=result.gradients_applied,
    )


def _read_rows(sequences: Sequence[training_pb2.TrainingSequence], pairs: list[Pair], loss: Loss) -> list[TrainRow]:
    """One row per sequence, with what the loss needs."""
    rows = []
    for index, (sequence, pair) in enumerate(zip(sequences, pairs, strict=True)):
        field, length = f"sequences[{index}]", int(pair.completion.size)
        rows.append(
            TrainRow(
                tokens=pair.tokens,
                start=pair.start,
                mask=read_mask(sequence.mask, f"{field}.mask", length)
                if sequence.HasField("mask")
                else np.ones(length, dtype=np.bool_),
                **read_arrays(sequence, field, length, loss),
            )
        )
    return rows


def _pending(request: training_pb2.ForwardBackwardRequest | training_pb2.OptimStepRequest) -> int | None:
    if not request.HasField("expected_pending"):
        return None
    if request.expected_pending < 0:
        raise out_of_range("expected_pending", request.expected_pending, "0 or more")
    return request.expected_pending


def read_client_state(
    request: training_pb2.OptimStepRequest | adapters_pb2.CheckpointAdapterRequest,
) -> bytes | None:
    """What shall be kept with the adapter for its trainer; None keeps what is there.

    Raises:
        InvalidArgument: OUT_OF_RANGE for more than is kept.
    """
    if not request.HasField("client_state"):
        return None
    length = len(request.client_state)
    if length > MAX_CLIENT_STATE:
        raise out_of_range("client_state", f"{length} bytes", f"at most {MAX_CLIENT_STATE}")
    return request.client_state


def _rate(rate: float, eps: float) -> float:
    most = _MOST_RATE * max(1.0, eps)
    if number(rate, "adamw.learning_rate", least=0) > most:
        raise out_of_range("adamw.learning_rate", f"{rate:g}", f"at most {most:g}, as 1e-4")
    return rate


def _beta(adamw: training_pb2.AdamW, name: str, default: float) -> float:
    field = f"adamw.{name}"
    beta = finite(optional(adamw, name, default), field)
    if not 0 <= beta < 1:
        raise out_of_range(field, beta, "a number from 0 and below 1")
    return beta
