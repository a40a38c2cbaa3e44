"""The gRPC channel to a server: its options, and no more."""

from __future__ import annotations

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

OPTIONS: tuple[tuple[str, int], ...] = (
    # A peer that is gone without a word is noticed within 15 s. Both timeouts are needed: the first alone is raised
    # to a minute by the second's default.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Retries are made in one place, the transport, which knows what may be sent twice.
    ("grpc.enable_retries", 0),
    # By default a lost connection is tried again after 1 s, then ever more seldom up to 2 minutes: too slow for a
    # server that is restarted in the middle of a training.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A server stands on this machine or in this network; a proxy for the web does not lead there.
    ("grpc.enable_http_proxy", 0),
)
"""What every channel is built with."""


def open_channel(target: str) -> grpc.Channel:
    """A channel to `target`, such as "127.0.0.1:7070" or "unix:/run/onebase.sock"; connects with its first call.

    Raises:
        ValueError: there is no port in it.
    """
    return grpc.insecure_channel(_checked(target), options=OPTIONS)


def open_async_channel(target: str) -> grpc.aio.Channel:
    """The same for asyncio; belongs to the event loop that runs now."""
    return grpc.aio.insecure_channel(_checked(target), options=OPTIONS)


def _checked(target: str) -> str:
    if ":" not in target:
        raise ValueError(f"target {target!r} has no port; give host and port, such as 127.0.0.1:7070")
    return target
