"""Operations as calls: what is sent, and what of the answer is kept.

Kept are the facts that the checks compare, a hash of the whole message (`raw`: a repeated call gets the same), and a
hash of its numbers alone (`digest`: equal wherever the weights are).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from onebase.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    types_pb2,
)

REWARD = "reward"
OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
ROWS = [([5 + i, 6 + 2 * i], [7 + 3 * i % 100, 8, 9 + i]) for i in range(12)]
"""Prompts and completions that everything trains on and is scored on."""
READS = ("logprob", "score", "generate")


class Stubs:
    """The services at one address, for one tenant."""

    def __init__(self, address: str, token: str = "") -> None:
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)


def _content(ids: Iterable[int]) -> types_pb2.Content:
    data = np.array(list(ids), dtype="<i8")
    return types_pb2.Content(
        tokens=types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=[len(data)], data=data.tobytes())
    )


def _sequence(row: int) -> types_pb2.Sequence:
    prompt, completion = ROWS[row]
    return types_pb2.Sequence(prompt=_content(prompt), completion=_content(completion))


def _floats(row: int, shift: float) -> types_pb2.Tensor:
    data = (np.arange(len(ROWS[row][1]), dtype="<f4") + row) / 8 + np.float32(shift)
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=[len(data)], data=data.tobytes())


def _training(row: int, loss: str) -> types_pb2.Message:
    one = training_pb2.TrainingSequence(sequence=_sequence(row))
    if loss == "importance_sampling":
        one.old_logprobs.CopyFrom(_floats(row, -5.0))
        one.advantages.CopyFrom(_floats(row, -0.5))
    elif loss == "value":
        one.old_values.CopyFrom(_floats(row, 0.0))
        one.returns.CopyFrom(_floats(row, 0.25))
    return one


def _present(args: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: args[name] for name in names if name in args}


def _create(args: dict[str, Any]) -> adapters_pb2.CreateAdapterRequest:
    lora = (
        None if "init_from" in args else types_pb2.LoraSpec(rank=args["rank"], alpha=8.0, target_modules=["all-linear"])
    )
    return adapters_pb2.CreateAdapterRequest(value_head=True, lora=lora, **_present(args, "name", "seed", "init_from"))


def _loaded(args: dict[str, Any]) -> dict[str, Any]:
    named = _present(args, "name", "replace", "with_optimizer", "seed")
    return {"kind": types_pb2.ADAPTER_KIND_POLICY, "value_head": True, **named}


def _pass(args: dict[str, Any]) -> training_pb2.ForwardBackwardRequest:
    loss = {
        "cross_entropy": training_pb2.CrossEntropyLoss(),
        "importance_sampling": training_pb2.ImportanceSamplingLoss(),
        "value": training_pb2.ValueLoss(),
    }[args["loss"]]
    return training_pb2.ForwardBackwardRequest(
        adapter=args["name"],
        sequences=[_training(row, args["loss"]) for row in args["rows"]],
        **{args["loss"]: loss},
        **_present(args, "expected_pending", "expected_version"),
    )


def _step(args: dict[str, Any]) -> training_pb2.OptimStepRequest:
    return training_pb2.OptimStepRequest(
        adapter=args["name"],
        adamw=training_pb2.AdamW(learning_rate=args["rate"]),
        max_grad_norm=args.get("clip", 0.0),
        **_present(args, "expected_pending", "expected_version"),
    )


def _generate(args: dict[str, Any]) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(max_new_tokens=args["tokens"], n=2, seed=args["seed"], ignore_eos=True)
    prompts = [_content(ROWS[row][0]) for row in args["rows"]]
    return inference_pb2.GenerateRequest(
        adapter=args["name"], prompts=prompts, sampling=sampling, return_logprobs=True, return_values=True
    )


def request_of(kind: str, args: dict[str, Any]) -> Any:
    """The message of an operation, without session and request_id; of an upload, its header."""
    named, sequences = args.get("name", ""), [_sequence(row) for row in args.get("rows", ())]
    match kind:
        case "create":
            return _create(args)
        case "load":
            return adapters_pb2.LoadAdapterRequest(path=args["path"], **_loaded(args))
        case "upload":
            files = [adapters_pb2.AdapterFile(name=n, bytes=b, sha256=s) for n, b, s in args["files"]]
            return adapters_pb2.UploadAdapterHeader(files=files, **_loaded(args))
        case "save":
            return adapters_pb2.SaveAdapterRequest(name=named, path=args["path"], with_optimizer=True)
        case "delete":
            return adapters_pb2.DeleteAdapterRequest(name=named)
        case "pass":
            return _pass(args)
        case "step":
            return _step(args)
        case "logprob":
            return inference_pb2.LogprobRequest(adapter=named, sequences=sequences)
        case "score":
            return inference_pb2.ScoreRequest(ppo_adapter_name=named, sequences=sequences)
        case "generate":
            return _generate(args)
        case "reward":
            return inference_pb2.RewardRequest(sequences=sequences, ppo_adapter_name=named)
        case "get":
            return adapters_pb2.GetAdapterRequest(name=named)
        case "list":
            return adapters_pb2.ListAdaptersRequest()
        case "download":
            return adapters_pb2.DownloadAdapterRequest(name=named, with_optimizer=True)
        case "open":
            return sessions_pb2.OpenSessionRequest(
                ttl_seconds=args["ttl"], ppo_adapter_name=named, resume_session_id=args.get("resume", "")
            )
        case "session":
            return sessions_pb2.GetSessionRequest()
        case "active":
            return sessions_pb2.SetActiveAdapterRequest(ppo_adapter_name=named)
        case "close":
            return sessions_pb2.CloseSessionRequest()
    raise ValueError(kind)


_METHODS = {
    "create": ("adapters", "CreateAdapter"), "load": ("adapters", "LoadAdapter"), "save": ("adapters", "SaveAdapter"),
    "delete": ("adapters", "DeleteAdapter"), "upload": ("adapters", "UploadAdapter"), "get": ("adapters", "GetAdapter"),
    "list": ("adapters", "ListAdapters"), "download": ("adapters", "DownloadAdapter"),
    "pass": ("training", "ForwardBackward"), "step": ("training", "OptimStep"),
    "logprob": ("inference", "Logprob"), "score": ("inference", "Score"), "generate": ("inference", "Generate"),
    "reward": ("inference", "Reward"), "open": ("sessions", "OpenSession"), "session": ("sessions", "GetSession"),
    "active": ("sessions", "SetActiveAdapter"), "close": ("sessions", "CloseSession"),
}  # fmt: skip
STREAMS = ("generate", "download")


def send(
    stubs: Stubs, kind: str, request: Any, timeout: float, cancel: float | None = None, data: bytes = b""
) -> list[Any]:
    """Sends an operation and returns all messages of its answer.

    Args:
        stubs: to whom.
        kind: of the operation.
        request: its message.
        timeout: seconds until its deadline.
        cancel: seconds until it is cancelled, if it is.
        data: bytes behind an upload's header.

    Raises:
        grpc.RpcError: as gRPC says.
    """
    service, name = _METHODS[kind]
    method = getattr(getattr(stubs, service), name)
    if kind in STREAMS:
        stream = method(request, timeout=timeout, metadata=stubs.metadata)
        if cancel is not None:
            next(stream, None)
            stream.cancel()
        return list(stream)
    call = method.future(
        _upload(request, data) if kind == "upload" else request, timeout=timeout, metadata=stubs.metadata
    )
    if cancel is not None:
        try:
            return [call.result(timeout=cancel)]
        except grpc.FutureTimeoutError:
            call.cancel()
            raise Cancelled from None
        except grpc.FutureCancelledError:
            raise Cancelled from None
    return [call.result()]


class Cancelled(Exception):
    """This side cancelled the call."""


def _upload(header: adapters_pb2.UploadAdapterHeader, data: bytes) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    yield adapters_pb2.UploadAdapterRequest(header=header)
    for start in range(0, len(data), 1 << 16):
        yield adapters_pb2.UploadAdapterRequest(data=data[start : start + (1 << 16)])


def refusal(error: grpc.RpcError) -> tuple[str, str]:
    """The code and the reason of an error."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return error.code().name, info.reason
    return error.code().name, ""


def _hash(*messages: Any) -> str:
    parts = (message.SerializeToString(deterministic=True) for message in messages)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def facts_of(kind: str, messages: list[Any]) -> dict[str, Any]:
    """What is kept of an answer."""
    facts: dict[str, Any] = {"raw": _hash(*messages)}
    if kind in STREAMS:
        return facts | (_completions(messages) if kind == "generate" else _files(messages))
    (message,) = messages
    if kind in ("create", "load", "upload", "get"):
        return facts | {"created": message.create_time, "version": message.version}
    if kind == "list":
        return facts | {"adapters": [[one.name, one.create_time, one.version] for one in message.adapters]}
    if kind in ("open", "session", "active"):
        return facts | {"session": message.session_id, "active": message.ppo_adapter_name, "ttl": message.ttl_seconds}
    if kind == "step":
        version = message.adapter.version
        return facts | {"version": version, "norm": message.grad_norm, "applied": message.gradients_applied}
    if kind == "save":
        return facts | {"version": message.adapter.version, "path": message.path}
    if kind in ("pass", "logprob", "score", "reward"):
        return facts | _numbers(kind, message)
    return facts


def _numbers(kind: str, message: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if kind == "pass":
        facts = {"version": message.adapter.version, "pending": message.pending_gradients}
        message.pending_gradients = 0
    elif kind == "logprob":
        facts = {"version": message.adapter.version}
    elif kind == "score":
        facts = {"version": message.policy.version}
        message.ClearField("policy")
    if kind in ("score", "reward"):
        facts["active"] = message.ppo_adapter_name
        message.ppo_adapter_name = ""
    if kind in ("pass", "logprob"):
        message.ClearField("adapter")
    return facts | {"digest": _hash(message)}


def _completions(messages: list[Any]) -> dict[str, Any]:
    versions = sorted({one.adapter.version for one in messages if one.HasField("adapter")})
    for one in messages:
        one.ClearField("adapter")
    messages.sort(key=lambda one: (one.prompt_index, one.completion_index))
    return {"versions": versions, "version": versions[0] if versions else -1, "digest": _hash(*messages)}


def _files(messages: list[Any]) -> dict[str, Any]:
    header = messages[0].header
    files = [[one.name, one.bytes, one.sha256] for one in header.files]
    tensors = {name: sha for name, _, sha in files if name.endswith(".safetensors")}
    return {"version": header.adapter.version, "files": files, "digest": tensors}


def keep_blob(folder: Path, messages: list[Any]) -> str:
    """Writes a download's bytes into a directory of such, and returns the file's name."""
    data = b"".join(one.data for one in messages[1:])
    path = folder / hashlib.sha256(data).hexdigest()
    if not path.exists():
        part = path.with_suffix(f".{id(messages)}")
        part.write_bytes(data)
        part.rename(path)
    return path.name
