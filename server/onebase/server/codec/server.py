"""Sessions, the server's facts and its status as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onebase.server.codec.fields import number, optional, out_of_range
from onebase.server.config import Limits
from onebase.server.errors import InvalidArgument
from onebase.server.jobs import BaseFacts, Work, WorkerStatus
from onebase.server.leases import Session
from onebase.server.names import name_of
from onebase.v1 import server_pb2, sessions_pb2, types_pb2

_DEFAULT_TTL = 60.0
_LONGEST_TTL = 3600.0
_MAX_LABEL = 100


def read_ttl(request: sessions_pb2.OpenSessionRequest) -> float:
    """Seconds that the session shall live without a call.

    Raises:
        InvalidArgument: NOT_FINITE; OUT_OF_RANGE.
    """
    ttl = number(optional(request, "ttl_seconds", _DEFAULT_TTL), "ttl_seconds")
    if not 1 <= ttl <= _LONGEST_TTL:
        raise out_of_range("ttl_seconds", ttl, f"1 to {_LONGEST_TTL:g}")
    return ttl


def read_label(request: sessions_pb2.OpenSessionRequest) -> str:
    """The session's name for people.

    Raises:
        InvalidArgument: BAD_LABEL.
    """
    if len(request.label) > _MAX_LABEL or not request.label.isprintable():
        raise InvalidArgument(
            "BAD_LABEL",
            f"label {request.label[:_MAX_LABEL]!r} has {len(request.label)} characters: use at most {_MAX_LABEL}, all "
            "printable",
            field="label",
        )
    return request.label


def session_message(session: Session) -> sessions_pb2.Session:
    """A session as its own client sees it."""
    return sessions_pb2.Session(
        session_id=session.session_id,
        ppo_adapter_name=session.active,
        label=session.label,
        leases=[name_of(key) for key in session.leases],
        ttl_seconds=session.ttl,
    )


def session_status(session: Session, *, age: float, idle: float) -> server_pb2.SessionStatus:
    """A session as everybody may see it: without its id."""
    return server_pb2.SessionStatus(
        label=session.label,
        ppo_adapter_name=session.active,
        leases=[name_of(key) for key in session.leases],
        requests_in_flight=session.in_flight,
        age_seconds=age,
        idle_seconds=idle,
    )


def base_message(facts: BaseFacts) -> server_pb2.BaseModel:
    """What is known of the base."""
    return server_pb2.BaseModel(
        model=facts.model,
        architecture=facts.architecture,
        fingerprint=facts.fingerprint,
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        max_context=facts.max_context,
        dtype=facts.dtype,
        device=facts.device,
        parameter_count=facts.parameter_count,
        weights_bytes=facts.weights_bytes,
        eos_token_ids=facts.eos_token_ids,
        pad_token_id=-1 if facts.pad_token_id is None else facts.pad_token_id,
        bos_token_id=-1 if facts.bos_token_id is None else facts.bos_token_id,
        quantization=facts.quantization,
        exact=facts.exact,
        chat_template=facts.chat_template,
    )


def limits_message(limits: Limits) -> server_pb2.ServerLimits:
    """What a request must keep to."""
    return server_pb2.ServerLimits(
        max_sequences_per_request=limits.max_sequences_per_request,
        max_tokens_per_request=limits.max_tokens_per_request,
        max_queued_requests=limits.max_queued_requests,
        max_queued_requests_per_session=limits.max_queued_requests_per_session,
        max_rank=limits.max_rank,
        max_message_bytes=limits.max_message_bytes,
        max_upload_bytes=limits.max_upload_bytes,
    )


def status_message(
    worker: WorkerStatus,
    sessions: Sequence[server_pb2.SessionStatus],
    adapters: Sequence[types_pb2.Adapter],
    process: Mapping[str, float],
    base_bytes: int,
) -> server_pb2.ServerStatus:
    """What the server is doing; `process` has uptime_seconds, rss_bytes and peak_rss_bytes."""
    return server_pb2.ServerStatus(
        uptime_seconds=process["uptime_seconds"],
        sessions=sessions,
        adapters=adapters,
        queues=[
            server_pb2.QueueStatus(
                work=work.value, waiting=worker.waiting.get(work, 0), running=worker.running.get(work, 0)
            )
            for work in Work
        ],
        generated_tokens_per_second=worker.generated_tokens_per_second,
        scored_tokens_per_second=worker.scored_tokens_per_second,
        trained_tokens_per_second=worker.trained_tokens_per_second,
        engine_steps=worker.engine_steps,
        rss_bytes=int(process["rss_bytes"]),
        peak_rss_bytes=int(process["peak_rss_bytes"]),
        base_bytes=base_bytes,
        kv_cache_bytes=worker.kv_cache_bytes,
        kv_slots_used=worker.kv_slots_used,
        kv_slots=worker.kv_slots,
    )
