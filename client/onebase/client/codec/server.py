"""ServerService: what a server is, and what it is doing."""

from __future__ import annotations

from onebase.client import types as t
from onebase.client.codec.rpc import Call, Rpc
from onebase.client.codec.values import decode_adapter
from onebase.v1 import server_pb2 as pb

GET_INFO = Rpc("ServerService/GetServerInfo", pb.GetServerInfoRequest, pb.ServerInfo, repeatable=True)
GET_STATUS = Rpc("ServerService/GetStatus", pb.GetStatusRequest, pb.ServerStatus, repeatable=True)


def info() -> Call[t.ServerInfo]:
    """GetServerInfo."""
    return GET_INFO.call(pb.GetServerInfoRequest(), _read_info)


def status() -> Call[t.ServerStatus]:
    """GetStatus."""
    return GET_STATUS.call(pb.GetStatusRequest(), _read_status)


def _read_info(info: pb.ServerInfo) -> t.ServerInfo:
    limits = info.limits
    return t.ServerInfo(
        version=info.version,
        base=_read_base(info.base),
        limits=t.ServerLimits(
            max_sequences_per_request=limits.max_sequences_per_request,
            max_tokens_per_request=limits.max_tokens_per_request,
            max_queued_requests=limits.max_queued_requests,
            max_queued_requests_per_session=limits.max_queued_requests_per_session,
            max_rank=limits.max_rank,
            max_message_bytes=limits.max_message_bytes,
        ),
        reward_adapters=tuple(info.reward_adapters),
    )


def _read_base(base: pb.BaseModel) -> t.BaseModel:
    return t.BaseModel(
        model=base.model,
        architecture=base.architecture,
        fingerprint=base.fingerprint,
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        max_context=base.max_context,
        dtype=base.dtype,
        device=base.device,
        parameter_count=base.parameter_count,
        weights_bytes=base.weights_bytes,
        eos_token_ids=tuple(base.eos_token_ids),
        pad_token_id=None if base.pad_token_id < 0 else base.pad_token_id,
        bos_token_id=None if base.bos_token_id < 0 else base.bos_token_id,
        quantization=base.quantization or "none",  # servers before it did not say
        exact=base.exact,
        chat_template=base.chat_template,
    )


def _read_status(status: pb.ServerStatus) -> t.ServerStatus:
    return t.ServerStatus(
        uptime_seconds=status.uptime_seconds,
        sessions=tuple(_read_session(session) for session in status.sessions),
        adapters=tuple(decode_adapter(adapter) for adapter in status.adapters),
        queues=tuple(
            t.QueueStatus(work=queue.work, waiting=queue.waiting, running=queue.running) for queue in status.queues
        ),
        generated_tokens_per_second=status.generated_tokens_per_second,
        scored_tokens_per_second=status.scored_tokens_per_second,
        trained_tokens_per_second=status.trained_tokens_per_second,
        engine_steps=status.engine_steps,
        rss_bytes=status.rss_bytes,
        peak_rss_bytes=status.peak_rss_bytes,
        base_bytes=status.base_bytes,
        kv_cache_bytes=status.kv_cache_bytes,
        kv_slots_used=status.kv_slots_used,
        kv_slots=status.kv_slots,
    )


def _read_session(session: pb.SessionStatus) -> t.SessionStatus:
    return t.SessionStatus(
        label=session.label,
        ppo_adapter_name=session.ppo_adapter_name,
        leases=tuple(session.leases),
        requests_in_flight=session.requests_in_flight,
        age_seconds=session.age_seconds,
        idle_seconds=session.idle_seconds,
    )
