"""Bearer tokens: made once, shown once, kept as hashes in a file that the server reads again when it changes.

A token is `ob_<id>_<secret>`. The id finds its record and is no secret; the secret has 256 bits from the system's
generator, so one round of SHA-256 is enough to keep it: there is nothing to guess.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from onebase.server.errors import OnebaseError, PermissionDenied, Unauthenticated, Unavailable
from onebase.server.identity import OPERATOR, Caller, Scope
from onebase.server.methods import RULES, Rule

log = logging.getLogger(__name__)

HEADER = "authorization"
_WAY_OUT = "send `authorization: Bearer TOKEN`, with a token of `onebase token create` (client: connect(token=...))"
_NOBODY = hashlib.sha256(b"").hexdigest()


class TokenFileError(ValueError):
    """A token file that cannot be read, or a token that is not in it."""


@dataclass(frozen=True)
class Token:
    """What is kept of a token."""

    id: str
    hash: str
    """SHA-256 of the whole token, in hexadecimal."""
    tenant: str
    scopes: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    created: float = 0.0
    """Seconds since 1970."""
    expires: float | None = None
    """Seconds since 1970; None is never."""

    def caller(self) -> Caller:
        """Who comes with it."""
        return Caller(self.tenant, self.id, frozenset(map(Scope, self.scopes)), frozenset(self.adapters))


class TokenFile:
    """The tokens in a file: JSON, replaced whole with each change, readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Token]:
        """The tokens by id.

        Raises:
            TokenFileError: the file is not there, or is no token file.
        """
        try:
            records = json.loads(self._path.read_bytes())["tokens"]
            found = [
                Token(**{**one, "scopes": tuple(one["scopes"]), "adapters": tuple(one["adapters"])}) for one in records
            ]
            for token in found:
                token.caller()
        except OSError as error:
            raise TokenFileError(
                f"tokens is {str(self._path)!r}: {error.strerror}; `onebase token create` makes it"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise TokenFileError(
                f"tokens is {str(self._path)!r}: it is no token file; `onebase token create` makes one"
            ) from None
        return {token.id: token for token in found}

    def add(self, tenant: str, scopes: tuple[Scope, ...], adapters: tuple[str, ...], seconds: float | None) -> str:
        """Makes a token, and returns it: the only time that it is seen.

        Args:
            tenant: whose it is.
            scopes: what it may do.
            adapters: the only policies and critics that it means; none means all of the tenant's.
            seconds: how long it is good for; None is for ever.

        Raises:
            TokenFileError: the file cannot be read; or the tenant's name is another's but for capitals: their
                directories would be one on some file systems.
        """
        name = secrets.token_hex(6)
        whole = f"ob_{name}_{secrets.token_urlsafe(32)}"
        now = time.time()
        token = Token(
            id=name,
            hash=_hash(whole),
            tenant=tenant,
            scopes=tuple(scope.value for scope in scopes),
            adapters=adapters,
            created=now,
            expires=None if seconds is None else now + seconds,
        )
        with self._changed() as tokens:
            for known in (OPERATOR, *(one.tenant for one in tokens.values())):
                if known != tenant and known.lower() == tenant.lower():
                    raise TokenFileError(
                        f"tenant {tenant!r} differs from {known!r} in capitals alone: use another name"
                    )
            tokens[name] = token
        return whole

    def revoke(self, name: str) -> None:
        """Forgets a token.

        Raises:
            TokenFileError: there is none of that id.
        """
        with self._changed() as tokens:
            if name not in tokens:
                raise TokenFileError(f"there is no token {name!r}: `onebase token list` shows the ids")
            del tokens[name]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Token]]:
        """The tokens, written back when the block ends; one process at a time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f".{self._path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = self.read() if self._path.exists() else {}
            yield tokens
            partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            text = json.dumps({"tokens": [asdict(token) for token in tokens.values()]}, indent=1)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
                out.write(f"{text}\n")
                out.flush()
                os.fsync(out.fileno())
            partial.replace(self._path)


class Doorman:
    """Says who calls, by the call's token and the method's rule.

    Args:
        path: the token file; None lets everybody in as the operator.
        clock: seconds since 1970.

    Raises:
        TokenFileError: the file cannot be read.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._tokens: Mapping[str, Token] = {}
        self._seen: tuple[int, int, int] | None = None
        self._unreadable = False
        if path is not None:
            self._seen = _stamp(path)  # before it is read: what is written meanwhile is noticed by the next call
            self._tokens = TokenFile(path).read()

    def admit(self, method: str, metadata: Mapping[str, str | bytes]) -> Caller:
        """Who makes this call.

        Args:
            method: its full name, "/package.Service/Method".
            metadata: the call's.

        Raises:
            Unauthenticated: TOKEN_MISSING, TOKEN_UNKNOWN, TOKEN_EXPIRED.
            PermissionDenied: SCOPE_MISSING.
            Unavailable: TOKENS_UNREADABLE.
        """
        if self._path is None:
            return Caller(OPERATOR)
        rule = RULES.get(method)
        if rule is not None and rule.public:
            return Caller("", scopes=frozenset())  # nobody: sees nothing, and may change nothing
        token = self._token(metadata.get(HEADER, ""))
        _check_scope(method, rule, token)
        return token.caller()

    def _token(self, header: str | bytes) -> Token:
        self._look_again()
        text = header if isinstance(header, str) else header.decode("latin-1")
        kind, _, whole = text.partition(" ")
        if not text or kind.lower() != "bearer":
            raise Unauthenticated("TOKEN_MISSING", f"this server wants to know who calls: {_WAY_OUT}")
        if self._unreadable:  # a good token is not told that it is unknown
            raise Unavailable(
                "TOKENS_UNREADABLE",
                "the server cannot read its token file just now, and lets nobody in: its log says why; repeat the call",
                retry_after=2.0,
            )
        whole = whole.strip()
        parts = whole.split("_", 2)
        token = self._tokens.get(parts[1]) if len(parts) == 3 else None
        fine = hmac.compare_digest(_hash(whole), token.hash if token else _NOBODY)
        if token is None or not fine:
            raise Unauthenticated("TOKEN_UNKNOWN", f"the token is not known here, or was revoked: {_WAY_OUT}")
        if token.expires is not None and self._clock() >= token.expires:
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(token.expires))
            error = Unauthenticated(
                "TOKEN_EXPIRED", f"the token {token.id} expired at {when}: ask the server's operator for a new one"
            )
            raise _known(error, token)
        return token

    def _look_again(self) -> None:
        """Reads the file anew if it has changed; while it cannot be read, no token is good."""
        assert self._path is not None
        stamp = _stamp(self._path)
        if stamp == self._seen and stamp is not None:
            return
        try:
            self._tokens = TokenFile(self._path).read()
        except TokenFileError as error:
            if not self._unreadable:
                log.error("nobody is let in: %s", error)
            self._tokens, self._seen, self._unreadable = {}, None, True
        else:
            self._seen, self._unreadable = stamp, False


def _check_scope(method: str, rule: Rule | None, token: Token) -> None:
    if rule is None:
        raise PermissionDenied("SCOPE_MISSING", f"{method} is in no scope: no token opens it")
    if rule.scope is not None and rule.scope.value not in token.scopes:
        error = PermissionDenied(
            "SCOPE_MISSING",
            f"the token {token.id} has the scopes {', '.join(token.scopes)}, and {method.rpartition('/')[2]} needs "
            f"{rule.scope.value}: ask the operator for a token with it",
        )
        raise _known(error, token)


def _known(error: OnebaseError, token: Token) -> OnebaseError:
    """An error that says for the audit log whose genuine token is turned away."""
    error.who = token.caller()
    return error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced."""
    try:
        there = path.stat()
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns, there.st_size


def _hash(whole: str) -> str:
    return hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()
