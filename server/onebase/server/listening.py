"""Where the server listens and how: its address, gRPC's settings, TLS, and the file that says the port."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc

from onebase.server.config import ConfigError, Limits, Security, ServerConfig


def check_address(config: ServerConfig) -> None:
    """Fails at once, before a model is opened for minutes, where the port is taken already.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise no_address(address_of(config.host, config.port), error.strerror or str(error)) from None


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """gRPC's settings: sizes of messages and headers, dead peers noticed within 8 s, and a taken port an error."""
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.http2.ping_timeout_ms", 3_000),  # without it a frozen client is noticed after a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ping this often
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", 8 * 2**10),  # over it, calls may be refused, and over twice that they all are
        ("grpc.absolute_max_metadata_size", 16 * 2**10),
        # Of one connection. What is over the queue's limits is refused in our words; what is far beyond by gRPC.
        ("grpc.max_concurrent_streams", 4 * limits.max_queued_requests + 1000),
        ("grpc.server_handshake_timeout_ms", 20_000),
    ]


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """What the server shows to its clients, and wants to see of them; None is plain text.

    Raises:
        ConfigError: a file cannot be read.
    """
    if security.tls_cert is None or security.tls_key is None:
        return None
    try:
        pair = (security.tls_key.read_bytes(), security.tls_cert.read_bytes())
        clients = security.tls_client_ca.read_bytes() if security.tls_client_ca else None
    except OSError as error:
        raise ConfigError(f"{error.filename!r} cannot be read: {error.strerror}") from None
    return grpc.ssl_server_credentials([pair], clients, require_client_auth=clients is not None)


def no_address(address: str, why: str) -> ConfigError:
    """What is told of an address that cannot be had."""
    return ConfigError(f"address is {address!r}: {why}; give another --port, or 0 for any free one")


def address_of(host: str, port: int) -> str:
    """As gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_port(path: Path | None, port: int) -> None:
    """Writes the port whole or not at all: somebody may be waiting for the file."""
    if path is not None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(f"{port}\n")
        partial.replace(path)
