"""The values that several requests share: arrays, texts, sequences, adapters.

What is checked here is what cannot be encoded: an array of the wrong kind or number of dimensions, an id that does
not fit its field. Everything else is for the server to judge, which knows the vocabulary and the limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from typing import Any, TypeGuard, TypeVar, cast

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.client.errors import InternalError
from onebase.v1 import types_pb2 as pb

M = TypeVar("M", bound=Message)
Name = TypeVar("Name", bound=str)
Item = TypeVar("Item")

_INT32 = np.iinfo(np.int32)
_DTYPES: Mapping[int, str] = {
    pb.DTYPE_INT32: "<i4",
    pb.DTYPE_INT64: "<i8",
    pb.DTYPE_FLOAT32: "<f4",
    pb.DTYPE_FLOAT64: "<f8",
    pb.DTYPE_BOOL: "?",
}
KINDS: Mapping[t.AdapterKind, pb.AdapterKind.ValueType] = {
    "policy": pb.ADAPTER_KIND_POLICY,
    "reward": pb.ADAPTER_KIND_REWARD,
    "reference": pb.ADAPTER_KIND_REFERENCE,
    "critic": pb.ADAPTER_KIND_CRITIC,
}
"""The kinds of adapters."""
POOLINGS: Mapping[t.Pooling, pb.Pooling.ValueType] = {
    "last_token": pb.POOLING_LAST_TOKEN,
    "last_not_pad": pb.POOLING_LAST_NOT_PAD,
}
"""Where scores are read."""

# ---------------------------------------------------------------------------------------------------- requests


def build(kind: type[M], where: str = "", /, **fields: Any) -> M:
    """A message of these fields. None leaves one unset; TypeError or ValueError names the one that does not fit."""
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                refusal = TypeError if isinstance(error, TypeError) else ValueError
                raise refusal(f"{where}{name}={value!r}: {error}") from None
        raise


def encode_name(names: Mapping[Name, int], name: Name, where: str) -> int:
    """The number of a name; ValueError lists the names there are."""
    if name not in names:
        raise ValueError(f"{where} must be one of {', '.join(names)}, not {name!r}")
    return names[name]


def encode_pooling(pooling: t.Pooling | None) -> int | None:
    """The number of a pooling rule; None leaves it to each adapter."""
    return None if pooling is None else encode_name(POOLINGS, pooling, "pooling")


def decode_name(names: Mapping[Name, int], number: int) -> Name:
    """The name of a number; InternalError if the server sent one that this client does not know."""
    for name, known in names.items():
        if known == number:
            return name
    raise InternalError(f"the server answered with {number} where one of {', '.join(names)} is known; is it newer?")


def encode_tokens(tokens: t.Tokens, where: str) -> pb.Tensor:
    """Token ids of shape [t]. TypeError unless they are integers, ValueError unless they fit in 32 bits."""
    array = _array(tokens, where)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.dtype == object and all(isinstance(token, int) for token in array):
        raise ValueError(f"{where} has ids that do not fit in 32 bits")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{where} must hold integer token ids, not {array.dtype}")
    if array.size and not _INT32.min <= int(array.min()) <= int(array.max()) <= _INT32.max:
        raise ValueError(f"{where} has ids from {array.min()} to {array.max()}, which do not fit in 32 bits")
    return pb.Tensor(dtype=pb.DTYPE_INT32, shape=array.shape, data=array.astype("<i4").tobytes())


def encode_floats(numbers: t.Floats | SequenceABC[float], where: str) -> pb.Tensor:
    """Numbers of shape [t] as float32. TypeError unless they are real numbers."""
    array = _array(numbers, where)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{where} must hold real numbers, not {array.dtype}")
    with np.errstate(over="ignore"):  # what overflows to infinity is refused by the server, which names the field
        return pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes())


def encode_mask(mask: NDArray[np.bool_] | SequenceABC[bool], where: str) -> pb.Tensor:
    """A mask of shape [t]. TypeError unless it is boolean."""
    array = _array(mask, where)
    if array.size and array.dtype.kind != "b":
        raise TypeError(f"{where} must be boolean, not {array.dtype}")
    return pb.Tensor(dtype=pb.DTYPE_BOOL, shape=array.shape, data=array.astype(np.bool_).tobytes())


def _array(values: object, where: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{where} must be one-dimensional: {error}") from None
    if array.ndim != 1:
        raise ValueError(f"{where} must have one dimension, not {array.ndim} (shape {list(array.shape)})")
    return array


def encode_content(content: t.Content, where: str) -> pb.Content:
    """A text as it is, token ids, or a conversation."""
    if isinstance(content, str):
        return build(pb.Content, f"{where}.", text=content)
    if isinstance(content, t.ChatMessage | Mapping):
        raise TypeError(f"{where} is one message; give a list of messages")
    if isinstance(content, bytes | bytearray) or not hasattr(content, "__len__"):
        raise TypeError(f"{where} must be text, token ids or a list of messages, not {type(content).__name__}")
    if _is_chat(content):
        return pb.Content(chat=encode_chat(content, where))
    return pb.Content(tokens=encode_tokens(cast("t.Tokens", content), where))


def encode_chat(chat: t.Chat, where: str) -> pb.Chat:
    """A conversation. TypeError or ValueError names the message that is none.

    Keys whose value is None are left out, as transformers does: `datasets` fills up with them.
    """
    return pb.Chat(messages=[_encode_message(message, f"{where}[{i}]") for i, message in enumerate(chat)])


def _encode_message(message: object, where: str) -> pb.ChatMessage:
    if isinstance(message, t.ChatMessage):
        message = vars(message)
    if not isinstance(message, Mapping):
        raise TypeError(f'{where} must be a message {{"role": …, "content": …}}, not {type(message).__name__}')
    fields = {key: value for key, value in message.items() if value is not None}
    if set(fields) != {"role", "content"}:
        raise ValueError(f'{where} must have "role" and "content", and has {", ".join(map(repr, fields)) or "nothing"}')
    return build(pb.ChatMessage, f"{where}.", **fields)


def encode_prompts(prompts: t.Content | SequenceABC[t.Content]) -> list[pb.Content]:
    """One prompt, or several. A list of messages is one, a list of lists of messages several."""
    if isinstance(prompts, str) or _is_token_ids(prompts) or _is_chat(prompts):
        return [encode_content(prompts, "prompts[0]")]
    several = cast("SequenceABC[t.Content]", prompts)
    return [encode_content(prompt, f"prompts[{i}]") for i, prompt in enumerate(several)]


def _is_chat(content: object) -> TypeGuard[t.Chat]:
    """Whether this is one conversation: its first element is a message."""
    return isinstance(content, SequenceABC) and len(content) > 0 and isinstance(content[0], t.ChatMessage | Mapping)


def _is_token_ids(prompts: object) -> TypeGuard[t.Tokens]:
    """Whether this is one prompt of ids. An empty list is none: it is an empty list of prompts."""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1 and prompts.dtype != object
    return isinstance(prompts, SequenceABC) and len(prompts) > 0 and isinstance(prompts[0], int | np.integer)


def encode_sequences(sequences: t.Sequence | Iterable[t.Sequence]) -> list[pb.Sequence]:
    """One sequence, or several."""
    return [encode_sequence(sequence, f"sequences[{i}]") for i, sequence in enumerate(as_list(sequences, t.Sequence))]


def encode_sequence(sequence: t.Sequence | t.TrainingSequence, where: str) -> pb.Sequence:
    """A prompt and what followed it."""
    return pb.Sequence(
        prompt=encode_content(sequence.prompt, f"{where}.prompt"),
        completion=encode_content(sequence.completion, f"{where}.completion"),
    )


def as_list(values: Item | Iterable[Item], kind: type[Item], where: str = "sequences") -> list[Item]:
    """One value or several, as a list; TypeError names the one that is not of this kind."""
    if isinstance(values, kind):
        return [values]
    if not isinstance(values, Iterable):
        raise TypeError(f"{where} must be a {kind.__name__} or several, not {type(values).__name__}")
    items = list(values)
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise TypeError(f"{where}[{i}] must be a {kind.__name__}, not {type(item).__name__}: {item!r}")
    return items


def encode_lora(lora: t.LoraSpec) -> pb.LoraSpec:
    """A LoRA shape."""
    return build(
        pb.LoraSpec, "lora.", **{**vars(lora), "target_modules": as_list(lora.target_modules, str, "target_modules")}
    )


# --------------------------------------------------------------------------------------------------- responses


def decode_array(tensor: pb.Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    """A tensor as a read-only array of this dtype and its own shape; InternalError if the two do not fit together."""
    if tensor.dtype not in _DTYPES:
        raise InternalError(f"the server answered with a tensor of dtype {tensor.dtype}, which this client cannot read")
    wire = np.dtype(_DTYPES[tensor.dtype])
    shape, data = tuple(tensor.shape), tensor.data
    if min(shape, default=0) < 0 or len(data) != wire.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise InternalError(f"the server answered with {len(data)} bytes for a tensor {wire.name}{list(shape)}")
    array = np.frombuffer(data, dtype=wire).reshape(shape).astype(dtype, copy=False)
    array.flags.writeable = False
    return array


def decode_floats(message: Message, name: str) -> t.Floats | None:
    """The float array of this name, or None if the server sent none."""
    return decode_array(getattr(message, name), np.float32) if message.HasField(name) else None


def decode_tokens(message: Message, name: str) -> NDArray[np.int32] | None:
    """The token ids of this name, or None if the server sent none."""
    return decode_array(getattr(message, name), np.int32) if message.HasField(name) else None


def decode_version(version: pb.AdapterVersion) -> t.AdapterVersion:
    """An adapter and its version."""
    return t.AdapterVersion(name=version.name, version=version.version)


def decode_adapter(adapter: pb.Adapter) -> t.Adapter:
    """An adapter's facts."""
    lora, memory = adapter.lora, adapter.memory
    return t.Adapter(
        name=adapter.name,
        kind=decode_name(KINDS, adapter.kind),
        version=adapter.version,
        lora=t.LoraSpec(
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=tuple(lora.target_modules),
            use_rslora=lora.use_rslora,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
        ),
        value_head=adapter.value_head,
        num_labels=adapter.num_labels,
        parameter_count=adapter.parameter_count,
        weights_bytes=memory.weights_bytes,
        gradient_bytes=memory.gradient_bytes,
        optimizer_bytes=memory.optimizer_bytes,
        old_version_bytes=memory.old_version_bytes,
        leased=adapter.leased,
        pending_gradients=adapter.pending_gradients,
        create_time=adapter.create_time,
        source=adapter.source,
        append_eos=adapter.append_eos if adapter.HasField("append_eos") else None,
        pooling=decode_name(POOLINGS, adapter.pooling) if adapter.pooling else None,
        durable_version=adapter.durable_version if adapter.HasField("durable_version") else None,
    )


def pair(names: SequenceABC[str], numbers: SequenceABC[Item]) -> dict[str, Item]:
    """One value per name; InternalError if the server sent more of one than of the other."""
    if len(names) != len(numbers):
        raise InternalError(f"the server answered with {len(numbers)} numbers for {len(names)} reward terms")
    return dict(zip(names, numbers, strict=True))
