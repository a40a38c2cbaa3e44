"""Certificates and keys as files: looked at before a base is loaded for minutes, and told by their flags.

gRPC says of a bad one that the port cannot be bound, and the rest in its own log.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from onebase.server.config import ConfigError, Security

_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")


def check_certificates(security: Security) -> None:
    """Whether the files of --tls-cert, --tls-key and --tls-client-ca are what they must be, and fit together.

    Raises:
        ConfigError: naming the flag of the one that is not.
    """
    cert, key = security.tls_cert, security.tls_key
    if cert is None or key is None:
        return
    _check_certificates("--tls-cert", cert)
    _check_key(cert, key)
    if security.tls_client_ca is not None:
        _check_certificates("--tls-client-ca", security.tls_client_ca)


def _check_certificates(flag: str, path: Path) -> None:
    _read(flag, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise ConfigError(f"{flag} is {str(path)!r}: it holds no certificate in PEM") from None


def _check_key(cert: Path, key: Path) -> None:
    text = _read("--tls-key", key)
    named = f"--tls-key is {str(key)!r}"
    if "ENCRYPTED" in text:
        raise ConfigError(f"{named}: it wants a passphrase, which nobody gives here; `openssl pkey` takes it off")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_nobody_is_asked)
    except ssl.SSLError as error:
        if getattr(error, "reason", None) in _MISMATCHES:
            raise ConfigError(
                f"{named}: it is not the key of --tls-cert {str(cert)!r}, of whose certificates the server's own must "
                "be the first"
            ) from None
        raise ConfigError(f"{named}: it holds no private key in PEM") from None


def _nobody_is_asked() -> str:
    return ""


def _read(flag: str, path: Path) -> str:
    try:
        return path.read_text("latin-1")
    except OSError as error:
        raise ConfigError(f"{flag} is {str(path)!r}: it cannot be read: {error.strerror}") from None
