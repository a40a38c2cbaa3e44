"""Every method of the contract: what is asked is what is sent, and what is sent back is what is read."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from onebase.client import types as t
from onebase.client.codec import adapters, inference, server, sessions, training
from onebase.client.codec.rpc import Rpc
from onebase.client.files import File, Outgoing
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2

MODULES = {
    adapters: adapters_pb2,
    inference: inference_pb2,
    server: server_pb2,
    sessions: sessions_pb2,
    training: training_pb2,
}
RPCS = [value for module in MODULES for value in vars(module).values() if isinstance(value, Rpc)]
SEQUENCE = t.Sequence("p", [1])
ROW = t.TrainingSequence([1], [2], [0.1], [0.2], [0.3], [0.4], [True])
FILES = Outgoing(Path("/nowhere"), (File("adapter_config.json", 2, "00"),))
NAMED = {"request_id": "r", "session_id": "s"}

CALLS = [
    inference.generate(
        "p", adapter="a", sampling=t.SamplingParams(seed=0), logprobs=True, values=True, adapter_version=0,
        stream_tokens=True, session_id="s",
    ),
    inference.logprob(SEQUENCE, adapter="a", entropy=True, values=True, logits=True, adapter_version=0, session_id="s"),
    inference.reference_logprob(SEQUENCE, reference="base", session_id="s"),
    inference.reward(
        SEQUENCE, ["r"], append_eos=False, pooling="last_token", per_token=True, ppo_adapter_name="a", session_id="s",
    ),
    inference.score(
        SEQUENCE, rewards={"r": 0.0}, reference="base", outputs=["values"], critic="c", append_eos=False,
        pooling="last_token", ppo_adapter_name="a", adapter_version=0, session_id="s",
    ),
    training.forward_backward(
        ROW, t.PpoLoss(), adapter="a", denominator=2.0, expected_version=0, expected_pending=1, **NAMED
    ),
    training.optim_step(
        t.AdamW(1.0), max_grad_norm=1.0, adapter="a", expected_version=0, expected_pending=1, client_state=b"s", **NAMED
    ),
    adapters.create("a", t.LoraSpec(), kind="critic", value_head=True, init_from="b", seed=1, **NAMED),
    adapters.get("a"),
    adapters.list_adapters("reward"),
    adapters.delete("a", **NAMED),
    adapters.load(
        "a", "/p", kind="policy", value_head=True, replace=True, with_optimizer=True, seed=1, append_eos=False,
        pooling="last_token", **NAMED
    ),
    adapters.save("a", "/p", with_optimizer=True, overwrite=True, merged=True, **NAMED),
    adapters.upload(
        "a", FILES, kind="policy", value_head=True, replace=True, with_optimizer=True, seed=1, append_eos=False,
        pooling="last_token", **NAMED
    ),
    adapters.download("a", with_optimizer=True, session_id="s"),
    adapters.checkpoint("a", client_state=b"s", **NAMED),
    adapters.client_state("a"),
    sessions.open_session("a", label="l", ttl=1.0, resume="r", request_id="q"),
    sessions.get("s"),
    sessions.set_active("s", "a"),
    sessions.keep_alive("s"),
    sessions.attend("s"),
    sessions.close("s"),
    server.info(),
    server.status(),
]  # fmt: skip


def payload(request):
    """What a request says; of a stream of requests, what its first message says."""
    return request.header if "header" in request.DESCRIPTOR.fields_by_name else request


def test_every_method_of_the_contract_is_here_with_its_types():
    contract = {
        f"{service.name}/{method.name}": (method.input_type.full_name, method.output_type.full_name)
        for module in MODULES.values()
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }

    assert {rpc.method: (rpc.request.DESCRIPTOR.full_name, rpc.answer.DESCRIPTOR.full_name) for rpc in RPCS} == contract
    assert {call.rpc.method for call in CALLS} == set(contract)


def test_what_changes_something_is_repeatable_only_with_a_request_id():
    # These change nothing but a session's active adapter or its lease of life, and name the outcome themselves.
    reads = {"Generate", "Logprob", "ReferenceLogprob", "Reward", "Score", "GetServerInfo", "GetStatus"}
    reads |= {"GetAdapter", "ListAdapters", "DownloadAdapter", "GetSession", "KeepAlive", "AttendSession"}
    reads |= {"GetClientState", "SetActiveAdapter"}
    for rpc in RPCS:
        named = "request_id" in payload(rpc.request()).DESCRIPTOR.fields_by_name
        assert rpc.repeatable == (named or rpc.method.split("/")[1] in reads), rpc.method


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.rpc.method)
def test_every_field_of_a_request_is_filled_from_an_argument(call):
    assert type(call.request) is call.rpc.request
    request = payload(call.request)
    filled = {descriptor.name for descriptor, _ in request.ListFields()}
    alternatives = {
        field.name for field in training_pb2.ForwardBackwardRequest.DESCRIPTOR.oneofs_by_name["loss"].fields
    }
    assert filled == set(request.DESCRIPTOR.fields_by_name) - (alternatives - {"ppo"})


# ------------------------------------------------------------------------------------------------------ reading


def fill(message, numbers):
    """Gives every field a value of its own, so that a field read from the wrong place shows."""
    for descriptor in message.DESCRIPTOR.fields:
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            continue
        value = make(descriptor, message, numbers)
        if value is None:
            continue
        if descriptor.is_repeated:
            getattr(message, descriptor.name).append(value)
        else:
            setattr(message, descriptor.name, value)
    return message


def make(descriptor, message, numbers):
    number = next(numbers)
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        there = getattr(message, descriptor.name)
        fill(there.add() if descriptor.is_repeated else there, numbers)
        return None
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return f"text {number}"
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True
    if descriptor.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return descriptor.enum_type.values[-1].number
    return number


def same(result, message):
    """Whether a dataclass holds what the message's fields of the same names do."""
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name not in message.DESCRIPTOR.fields_by_name:
            continue
        sent = getattr(message, field.name)
        if dataclasses.is_dataclass(value):
            same(value, sent)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for one, other in zip(value, sent, strict=True):
                same(one, other)
        elif isinstance(value, dict):
            assert value == dict(sent), field.name
        elif field.name not in ("kind", "pooling"):
            assert (list(value) if isinstance(value, tuple) else value) == sent, field.name


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        (server.info(), set()),
        (server.status(), set()),
        (sessions.get("s"), set()),
        (adapters.get("a"), {"weights_bytes", "gradient_bytes", "optimizer_bytes", "old_version_bytes"}),
        (adapters.save("a", "p", with_optimizer=True, overwrite=True, merged=True, request_id="r"), set()),
        (training.optim_step(t.AdamW(1), max_grad_norm=0, adapter="", expected_version=None, **NAMED), set()),
    ],
    ids=lambda value: value.rpc.method if hasattr(value, "rpc") else "",
)
def test_every_field_of_a_plain_answer_is_read_into_its_own_place(call, extra):
    message = fill(call.rpc.answer(), itertools.count(1))

    result = call.read(message)

    same(result, message)
    names = {field.name for field in dataclasses.fields(result)}
    assert names - set(call.rpc.answer.DESCRIPTOR.fields_by_name) == extra


def test_an_adapters_memory_is_read_into_its_own_places():
    message = fill(adapters.GET.answer(), itertools.count(1))
    message.lora.rank_pattern["q"] = 4
    message.lora.alpha_pattern["v"] = 2.5

    adapter = adapters.get("a").read(message)

    assert [adapter.weights_bytes, adapter.gradient_bytes, adapter.optimizer_bytes, adapter.old_version_bytes] == [
        message.memory.weights_bytes,
        message.memory.gradient_bytes,
        message.memory.optimizer_bytes,
        message.memory.old_version_bytes,
    ]
    assert adapter.total_bytes == sum(getattr(message.memory, f.name) for f in message.memory.DESCRIPTOR.fields)
    assert (adapter.kind, adapter.pooling) == ("critic", "last_not_pad")
    assert (adapter.lora.rank_pattern, adapter.lora.alpha_pattern) == ({"q": 4}, {"v": 2.5})


def test_a_missing_special_token_is_none():
    info = server_pb2.ServerInfo(base=server_pb2.BaseModel(pad_token_id=-1, bos_token_id=0))

    base = server.info().read(info).base

    assert (base.pad_token_id, base.bos_token_id) == (None, 0)


@pytest.mark.parametrize(("told", "read"), [("nf4", "nf4"), ("none", "none"), ("", "none")])
def test_a_server_that_does_not_speak_of_quantization_has_none(told, read):
    info = server_pb2.ServerInfo(base=server_pb2.BaseModel(quantization=told))

    assert server.info().read(info).base.quantization == read
