"""The gRPC channel to a server: its options, TLS, and the token that goes with each call."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

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


PathLike: TypeAlias = str | os.PathLike[str]

_SETTING = "tls (--tls-ca, tls_ca)"
"""How the setting is called in Python, by the commands, and in a training's config."""


class TlsFileError(ValueError):
    """A file of certificates cannot be read, or holds none."""


@dataclass(frozen=True)
class Security:
    """How a client shows who it is, and how it knows its server."""

    token: str = field(default="", repr=False)
    """Goes with each call; empty sends none."""
    tls: bool | PathLike | None = None
    """True: TLS, with the system's certificates; a path: with these certificates (PEM). None and False: plain text; a
    token goes over plain text to another machine only where this is False."""
    tls_certificate: tuple[PathLike, PathLike] | None = field(default=None, repr=False)
    """The client's own certificates and their private key (PEM), for servers that ask for them."""

    def __post_init__(self) -> None:
        if not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise ValueError("token is none: give what `onebase token create` printed")
        if self.tls_certificate is not None and not self.tls:
            raise ValueError(
                "tls_certificate is set, and tls is not: give tls=True, or the path of a CA's certificates"
            )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def credentials(self, target: str) -> grpc.ChannelCredentials | None:
        """What the channel to `target` is opened with; None is plain text.

        Raises:
            ValueError: a file cannot be read; or the token would go over the network in plain text.
        """
        if not self.tls:
            if self.token and self.tls is None and not is_local(target):
                raise ValueError(
                    f"target {target!r} is another machine, and the token would go there in plain text: give tls=True, "
                    "or the path of a CA's certificates (tls=False, if the network is private)"
                )
            return None
        certificate, key = self.tls_certificate or (None, None)
        authority = None if self.tls is True else _read_certificates(self.tls)
        return grpc.ssl_channel_credentials(
            authority,
            private_key=None if key is None else _read("tls_certificate", key),
            certificate_chain=None if certificate is None else _read("tls_certificate", certificate),
        )

    def trouble(self, details: str) -> str:
        """What TLS has to do with a server that does not answer, from gRPC's words for it; "" if nothing."""
        known = "the system's authorities" if self.tls is True else f"{os.fspath(self.tls)!r}" if self.tls else ""
        if "certificate has expired" in details:
            return "the server's certificate has expired: its operator must give it another one"
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return f"the server's certificate is not signed by {known}: give those of its authority as {_SETTING}"
        if "not in peer certificate" in details:
            return "the server's certificate is for other names than this one: use a name that it has"
        if "WRONG_VERSION_NUMBER" in details:
            return f"this server speaks plain text: leave {_SETTING} out"
        if "Socket closed" not in details:
            return ""
        if known:
            return "it closes the connection: if it wants a client's certificate, give tls_certificate"
        return (
            f"it closes a plain-text connection, as a server does that wants TLS: give its certificates as {_SETTING}"
        )


def tls_of(setting: str) -> bool | str | None:
    """The `tls` that a setting means: a file of certificates, "system" for the system's, nothing for plain text."""
    return True if setting == "system" else setting or None


def is_local(target: str) -> bool:
    """Whether what goes to `target` stays on this machine."""
    if target.startswith(("unix:", "localhost:")):
        return True
    try:
        return ipaddress.ip_address(target.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False


def _read_certificates(path: PathLike) -> bytes:
    data = _read("tls", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise TlsFileError(f"tls is {os.fspath(path)!r}: the file holds no certificates in PEM") from None
    return data


def _read(key: str, path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsFileError(f"{key} is {os.fspath(path)!r}: {error.strerror}") from None


_PLAIN = Security()


def open_channel(target: str, security: Security = _PLAIN) -> grpc.Channel:
    """A channel to `target`, such as "127.0.0.1:7070" or "unix:/run/onebase.sock"; connects with its first call.

    Raises:
        ValueError: there is no port in it; or as `Security.credentials`.
    """
    credentials = security.credentials(_checked(target))
    if credentials is None:
        return grpc.insecure_channel(target, options=OPTIONS)
    return grpc.secure_channel(target, credentials, options=OPTIONS)


def open_async_channel(target: str, security: Security = _PLAIN) -> grpc.aio.Channel:
    """The same for asyncio; belongs to the event loop that runs now."""
    credentials = security.credentials(_checked(target))
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    return grpc.aio.secure_channel(target, credentials, options=OPTIONS)


def _checked(target: str) -> str:
    for scheme in ("http://", "https://"):
        if target.startswith(scheme):
            raise ValueError(f"target {target!r} is no address: give HOST:PORT, without {scheme}")
    if ":" not in target:
        raise ValueError(f"target {target!r} has no port; give host and port, such as 127.0.0.1:7070")
    return target
