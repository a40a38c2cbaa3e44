"""The losses of a ForwardBackward: their settings, and which arrays each of them needs of every sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from onebase.server.access import need_value_head
from onebase.server.codec.fields import number, optional, out_of_range, required
from onebase.server.codec.tensors import read_floats
from onebase.server.errors import InvalidArgument
from onebase.server.jobs import (
    CrossEntropyLoss,
    CustomLoss,
    DpoLoss,
    Floats,
    ImportanceSamplingLoss,
    Loss,
    PpoLoss,
    ValueLoss,
)
from onebase.server.registry import Entry
from onebase.v1 import training_pb2

_PPO, _DPO, _VALUE = PpoLoss(), DpoLoss(), ValueLoss()
_VALUES = ("old_values", "returns")
_GRADIENTS = ("logprob_gradients", "value_gradients", "entropy_gradients")
_ARRAYS = ("old_logprobs", "advantages", *_VALUES, "reference_logprobs", *_GRADIENTS)
"""What some losses use and others do not."""


@dataclass(frozen=True)
class Arrays:
    """Names of the arrays that a loss takes of each sequence."""

    needed: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


def read_loss(request: training_pb2.ForwardBackwardRequest) -> Loss:
    """The loss that is asked for, with the contract's defaults.

    Raises:
        InvalidArgument: REQUIRED; NOT_FINITE; OUT_OF_RANGE.
    """
    match request.WhichOneof("loss"):
        case "ppo":
            return _read_ppo(request.ppo)
        case "importance_sampling":
            return ImportanceSamplingLoss()
        case "cross_entropy":
            return CrossEntropyLoss()
        case "dpo":
            return DpoLoss(_positive(request.dpo, "dpo", "beta", _DPO.beta), _smoothing(request.dpo.label_smoothing))
        case "custom":
            return CustomLoss()
        case "value":
            return ValueLoss(_positive(request.value, "value", "cliprange_value", _VALUE.cliprange_value))
        case None:
            raise required("loss", "give ppo, which may be empty for its defaults, or another of the losses")


def arrays_of(loss: Loss) -> Arrays:
    """What each sequence must and may bring for this loss, besides a mask and weights, which any may have."""
    match loss:
        case PpoLoss():
            needed = ("old_logprobs", "advantages")
            reference = ("reference_logprobs",) if loss.kl_coef else ()
            # without a value loss they still make statistics
            return Arrays((*needed, *_VALUES, *reference)) if loss.vf_coef else Arrays((*needed, *reference), _VALUES)
        case ImportanceSamplingLoss():
            return Arrays(("old_logprobs", "advantages"))
        case CrossEntropyLoss():
            return Arrays()
        case DpoLoss():
            return Arrays(("reference_logprobs",))
        case CustomLoss():
            return Arrays(allowed=_GRADIENTS)
        case ValueLoss():
            return Arrays(_VALUES)


def read_arrays(
    sequence: training_pb2.TrainingSequence, field: str, length: int, loss: Loss
) -> dict[str, Floats | None]:
    """The arrays of one sequence, by name, float32 [length] each, or None for what may be left out.

    Raises:
        InvalidArgument: REQUIRED; UNUSED_FIELD; BAD_TENSOR; LENGTH_MISMATCH; NOT_FINITE.
    """
    arrays, given = arrays_of(loss), [name for name in _ARRAYS if sequence.HasField(name)]  # type: ignore[arg-type]
    for name in arrays.needed:
        if name not in given:
            raise required(f"{field}.{name}", f"give {length} numbers, one per completion token")
    for name in given:
        if name not in arrays.needed + arrays.allowed:
            raise _unused(f"{field}.{name}", loss)
    if isinstance(loss, CustomLoss) and not given:
        ways = "give it, value_gradients or entropy_gradients: one number per completion token"
        raise required(f"{field}.logprob_gradients", ways)
    if sequence.HasField("weights"):
        given.append("weights")
    found = {name: read_floats(getattr(sequence, name), f"{field}.{name}", length) for name in given}
    return {name: found.get(name) for name in (*_ARRAYS, "weights")}


def check_value_head(entry: Entry, loss: Loss, sequences: Sequence[training_pb2.TrainingSequence]) -> None:
    """Refuses a loss of values where there is no value head.

    Raises:
        FailedPrecondition: NO_VALUE_HEAD.
    """
    match loss:
        case PpoLoss(vf_coef=vf_coef) if vf_coef:
            need_value_head(entry, "ppo.vf_coef")
        case ValueLoss():
            need_value_head(entry, "value")
        case CustomLoss():
            for index, sequence in enumerate(sequences):
                if sequence.HasField("value_gradients"):
                    need_value_head(entry, f"sequences[{index}].value_gradients")


def check_pairs(loss: Loss, count: int) -> None:
    """Refuses a chosen sequence without its rejected one.

    Raises:
        InvalidArgument: UNPAIRED.
    """
    if isinstance(loss, DpoLoss) and count % 2:
        field = f"sequences[{count - 1}]"
        raise InvalidArgument(
            "UNPAIRED",
            f"{field} is the last of {count} sequences, and dpo takes pairs of them: give each chosen sequence, then "
            "its rejected one",
            field=field,
        )


def _read_ppo(ppo: training_pb2.PpoLoss) -> PpoLoss:
    return PpoLoss(
        cliprange=_positive(ppo, "ppo", "cliprange", _PPO.cliprange),
        cliprange_value=_positive(ppo, "ppo", "cliprange_value", _PPO.cliprange_value),
        vf_coef=number(optional(ppo, "vf_coef", _PPO.vf_coef), "ppo.vf_coef", least=0),
        ratio_threshold=_positive(ppo, "ppo", "ratio_threshold", _PPO.ratio_threshold),
        cliprange_high=number(ppo.cliprange_high, "ppo.cliprange_high", above=0)
        if ppo.HasField("cliprange_high")
        else None,
        kl_coef=number(ppo.kl_coef, "ppo.kl_coef", least=0),
        entropy_coef=number(ppo.entropy_coef, "ppo.entropy_coef", least=0),
    )


def _positive(message: Message, where: str, name: str, default: float) -> float:
    return number(optional(message, name, default), f"{where}.{name}", above=0)


def _smoothing(share: float) -> float:
    if not 0 <= number(share, "dpo.label_smoothing") < 0.5:
        raise out_of_range("dpo.label_smoothing", share, "a number from 0 and below 0.5")
    return share


def _unused(field: str, loss: Loss) -> InvalidArgument:
    name = type(loss).__name__
    way_out = "leave it out"
    if isinstance(loss, PpoLoss) and field.endswith(".reference_logprobs"):
        way_out += ", or set ppo.kl_coef"
    return InvalidArgument("UNUSED_FIELD", f"{field} is set, and {name} does not use it: {way_out}", field=field)
