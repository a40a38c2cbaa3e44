"""Inputs on their way to a real server, and what may come of them: an answer or a refusal, in time, and no bug."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random

import grpc
from fuzz import grammar
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from server.harness import floats, pair, text_of, tokens_of

from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2, types_pb2

BUGS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
"""What no input may be answered with."""
SECONDS = 30.0
"""A call that takes longer hangs."""
_OWN = "INTERNAL: Internal error from Core"
"""What grpc.aio says by itself where it still sends on a stream that the server has ended: it loses the status."""
NAMED = ("x", "w")
"""Adapters that valid requests name and do not make: what is trained and asked, and what other sessions lease."""
_HEALTH = "/grpc.health.v1.Health/"
PATIENCE = 0.3
"""How long a stream that goes on until somebody ends it is read."""
ENDLESS = ("AttendSession", "Watch")
OTHERS: list[MethodDescriptor] = [
    *health_pb2.DESCRIPTOR.services_by_name["Health"].methods,
    *reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].methods,
]
"""Methods that are not onebase's own, and are served beside them."""


@dataclass(frozen=True)
class Call:
    """One input: a method and the messages that are sent to it."""

    method: str
    messages: tuple[bytes, ...]
    client_streaming: bool
    server_streaming: bool
    token: str

    @property
    def endless(self) -> bool:
        """Whether its answers go on until somebody ends it."""
        return self.method.rpartition("/")[2] in ENDLESS


def draw(random: Random, session: str, spare: str, valid: dict[str, list[bytes]], token: str) -> Call:
    """A call of some method; one in twenty without a token, or with one that is none.

    What closes a session closes the `spare` one, or with each close two dozen calls that are under way meet nothing.
    """
    method = random.choice(grammar.METHODS) if random.random() < 0.97 else random.choice(OTHERS)
    return call_of(random, method, spare if method.name == "CloseSession" else session, valid, token)


def call_of(random: Random, method: MethodDescriptor, session: str, valid: dict[str, list[bytes]], token: str) -> Call:
    """A call of this method."""
    count = random.choice([0, 1, 1, 2, 3]) if method.client_streaming else 1
    known = valid.get(method.name, [])
    messages = tuple(grammar.request(random, method, session, known) for _ in range(count))
    if random.random() < 0.05:
        token = random.choice(["", "x", "ob_000000000000_guess", token[:-1]])
    return Call(grammar.path_of(method), messages, method.client_streaming, method.server_streaming, token)


@dataclass(frozen=True)
class Told:
    """How a call ended."""

    code: str
    """OK; gRPC's name of a refusal, with the reason if there is one; HANG; or CUT for a stream that went on until the
    caller ended it."""
    problem: str | None = None
    """What is wrong with that, if anything is."""


async def send(channel: grpc.aio.Channel, call: Call) -> Told:
    """Makes a call, reads what comes, and says what is wrong with it, if anything is."""
    for pause in (0.0, 0.05, 0.5, 5.0):
        told = await _send(channel, call, pause)
        if told.problem != _OWN:
            break
    return told


async def _slowly(messages: tuple[bytes, ...], pause: float) -> AsyncIterator[bytes]:
    for message in messages:
        await asyncio.sleep(pause)  # before the first, too: a call without a token has ended before it comes
        yield message
    await asyncio.sleep(pause)


async def _send(channel: grpc.aio.Channel, call: Call, pause: float) -> Told:
    kind = f"{'stream' if call.client_streaming else 'unary'}_{'stream' if call.server_streaming else 'unary'}"
    made = getattr(channel, kind)(call.method)
    seconds = PATIENCE if call.endless else SECONDS
    asked = made(
        _slowly(call.messages, pause) if call.client_streaming else call.messages[0],
        timeout=seconds,
        metadata=(("authorization", f"Bearer {call.token}"),) if call.token else (),
    )
    try:
        async with asyncio.timeout(seconds + 10):
            if call.server_streaming:
                async for _ in asked:
                    pass
            else:
                await asked
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Told("CUT") if call.endless else Told("HANG", f"hang: no answer in {seconds:g} s")
        if code in BUGS:
            return Told(code.name, f"{code.name}: {error.details()}")
        return explained(call.method, error)
    except TimeoutError:
        asked.cancel()
        return Told("HANG", f"hang: the call itself did not end in {seconds + 10:g} s")
    return Told("OK")


def explained(method: str, error: grpc.RpcError) -> Told:
    """A refusal, which is wrong unless it has one ErrorInfo of ours, whose reason is a word for programs.

    Two kinds of refusal never come to our code. A deadline that ends a call ends it in the client, before anything of
    the server's is read (`_send` sees to that). And health, which is gRPC's own service, sets its NOT_FOUND for a
    service that it does not know by itself.
    """
    name = error.code().name
    if method.startswith(_HEALTH) and name == "NOT_FOUND":
        return Told(name)
    said = f"unexplained: {name} {error.details()!r}"
    try:
        status = rpc_status.from_call(error)
    except ValueError as disagree:  # the code or the message in the details is another
        return Told(name, f"{said}: {disagree}")
    found = [] if status is None else [one for one in status.details if one.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    if len(found) != 1:
        return Told(name, f"{said} has {len(found)} ErrorInfo")
    info = error_details_pb2.ErrorInfo.FromString(found[0].value)
    if info.domain != "onebase" or not re.fullmatch("[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", info.reason):
        return Told(name, f"{said} is explained by {info.domain!r}, {info.reason!r}")
    return Told(f"{name} {info.reason}")


# ------------------------------------------------------------------------------------------------ valid ones


_ARRAYS = {
    "ppo": ("old_logprobs", "old_values", "advantages", "returns"),
    "importance_sampling": ("old_logprobs", "advantages"),
    "cross_entropy": (),
    "custom": ("logprob_gradients", "value_gradients", "entropy_gradients"),
    "value": ("old_values", "returns"),
}
"""What each loss takes of a sequence."""


def valid_requests(session: str) -> dict[str, list[bytes]]:
    """Requests that are carried out as they are, by their method's name: what faults are made in."""
    sequences = [pair("w5 w6", "w7 w8 w9"), pair((5, 6, 7), (8, 9))]
    terms = [{"adapter": "r", "weight": 0.5}]
    arrays = {name: floats(-1, 0.5) for names in _ARRAYS.values() for name in names}
    mask = types_pb2.Tensor(dtype=types_pb2.DTYPE_BOOL, shape=[2], data=b"\1\1")
    rows = {
        loss: training_pb2.TrainingSequence(
            sequence=pair((5, 6, 7), (8, 9)), mask=mask, **{name: arrays[name] for name in names}
        )
        for loss, names in _ARRAYS.items()
    }
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}
    file = adapters_pb2.AdapterFile(name="adapter_config.json", bytes=2, sha256="0" * 64)
    header = adapters_pb2.UploadAdapterHeader(name="x", kind=types_pb2.ADAPTER_KIND_POLICY, files=[file], replace=True)
    messages: dict[str, list[Message]] = {
        "Generate": [
            inference_pb2.GenerateRequest(
                session_id=session,
                adapter="x",
                prompts=[text_of("w5 w6"), tokens_of(5, 6, 7)],
                sampling={"max_new_tokens": 4, "n": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "stop": ["w9"]},
                return_logprobs=True,
                return_values=True,
                stream_tokens=True,
            )
        ],
        "Logprob": [
            inference_pb2.LogprobRequest(adapter="x", sequences=sequences, return_entropy=True, return_logits=True)
        ],
        "ReferenceLogprob": [inference_pb2.ReferenceLogprobRequest(sequences=sequences)],
        "Reward": [inference_pb2.RewardRequest(rewards=terms, sequences=sequences, append_eos=True, per_token=True)],
        "Score": [
            inference_pb2.ScoreRequest(
                session_id=session, ppo_adapter_name="x", rewards=terms, sequences=sequences, outputs=[1, 2, 3, 4, 5]
            )
        ],
        "ForwardBackward": [
            training_pb2.ForwardBackwardRequest(session_id=session, adapter="x", sequences=[row], **{loss: {}})
            for loss, row in rows.items()
        ],
        "OptimStep": [
            training_pb2.OptimStepRequest(
                session_id=session, adapter="x", adamw={"learning_rate": 1e-4}, max_grad_norm=1
            )
        ],
        "CreateAdapter": [adapters_pb2.CreateAdapterRequest(session_id=session, name="y", lora=lora, value_head=True)],
        "DeleteAdapter": [adapters_pb2.DeleteAdapterRequest(session_id=session, name="y")],
        "GetAdapter": [adapters_pb2.GetAdapterRequest(name="x")],
        "LoadAdapter": [
            adapters_pb2.LoadAdapterRequest(
                session_id=session, name="z", kind=types_pb2.ADAPTER_KIND_POLICY, path="policy", replace=True
            )
        ],
        "SaveAdapter": [
            adapters_pb2.SaveAdapterRequest(session_id=session, name="x", path="saved", overwrite=True, merged=True)
        ],
        "UploadAdapter": [
            adapters_pb2.UploadAdapterRequest(header=header),
            adapters_pb2.UploadAdapterRequest(data=b"{}"),
        ],
        "DownloadAdapter": [adapters_pb2.DownloadAdapterRequest(name="x", with_optimizer=True)],
        "OpenSession": [sessions_pb2.OpenSessionRequest(ppo_adapter_name="w", label="l", ttl_seconds=5)],
        "GetSession": [sessions_pb2.GetSessionRequest(session_id=session)],
        "SetActiveAdapter": [sessions_pb2.SetActiveAdapterRequest(session_id=session, ppo_adapter_name="x")],
        "KeepAlive": [sessions_pb2.KeepAliveRequest(session_id=session)],
    }
    return {name: [one.SerializeToString() for one in found] for name, found in messages.items()}
