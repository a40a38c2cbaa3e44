"""Sessions, their active adapters, and the leases they hold.

A lease is the right to train, replace or delete a policy or critic; one live session at most holds it. Leases go by the
adapter's key (`registry`), so they outlive a replacement of what the name means. A session is its tenant's: for others
it is not there. A session lives while it has requests in
flight, and for its ttl after its last call. Its id is its client's secret: no message and no log line shows it.

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from onebase.server.errors import Aborted, NotFound, PermissionDenied, ResourceExhausted
from onebase.server.identity import OPERATOR, caller
from onebase.server.names import name_of
from onebase.server.store import SessionRow

log = logging.getLogger(__name__)

Clock = Callable[[], float]

MAX_SESSIONS = 4096


@dataclass(eq=False)
class Session:
    """One client's session. Times are seconds on the clock of `Sessions`."""

    session_id: str = field(repr=False)
    queue: str
    """Names the session's queue in the worker; no secret."""
    label: str
    ttl: float
    opened: float
    last_call: float
    active: str = ""
    """Name of the active adapter: the session's ppo_adapter_name."""
    leases: dict[str, None] = field(default_factory=dict)
    """Keys of the policies and critics whose lease it holds, in the order it took them."""
    in_flight: int = 0
    tenant: str = OPERATOR

    @property
    def who(self) -> str:
        """How messages call it; other tenants are not told its label."""
        if caller().tenant not in (self.tenant, OPERATOR):
            return "a session of another tenant"
        return f"session {self.label!r}" if self.label else "a session without a label"


class Sessions:
    """The live sessions.

    Args:
        clock: a monotonic clock in seconds.
        max_sessions: most sessions that live at once.
    """

    def __init__(self, clock: Clock = time.monotonic, *, max_sessions: int = MAX_SESSIONS) -> None:
        self.given_back: Callable[[str], None] = lambda _name: None
        """Is told the name of each adapter whose lease ends."""
        self.changed: Callable[[Session], None] = lambda _session: None
        """Is told each session whose label, ttl, active adapter or leases are new."""
        self.ended: Callable[[Session], None] = lambda _session: None
        """Is told each session that ends."""
        self._clock = clock
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}
        self._holders: dict[str, Session] = {}
        self._opened = 0

    def open(self, label: str, ttl: float) -> Session:
        """Begins a session without an active adapter.

        Raises:
            ResourceExhausted: TOO_MANY_SESSIONS.
        """
        self.sweep()
        if len(self._sessions) >= self._max_sessions:
            raise ResourceExhausted(
                "TOO_MANY_SESSIONS",
                f"{len(self._sessions)} sessions are open, the most this server keeps: close some, or wait",
                retry_after=1.0,
            )
        now = self._clock()
        self._opened += 1
        session = Session(secrets.token_hex(16), f"s{self._opened}", label, ttl, opened=now, last_call=now)
        session.tenant = caller().tenant
        self._sessions[session.session_id] = session
        self.changed(session)
        log.info("%s opened", session.who)
        return session

    def restore(self, rows: Iterable[SessionRow]) -> None:
        """Goes on with the sessions of the server that was here before, each with its whole ttl from now."""
        now = self._clock()
        for row in rows:
            session = Session(
                row.session,
                row.queue,
                row.label,
                row.ttl,
                opened=now,
                last_call=now,
                active=row.active,
                tenant=row.tenant,
            )
            self._sessions[row.session] = session
            self._opened = max(self._opened, int(row.queue.removeprefix("s")))
            for name in row.leases:
                session.leases[name] = None
                self._holders[name] = session

    def renew(self, session: Session, label: str, ttl: float) -> None:
        """Gives a session another label and ttl."""
        if (session.label, session.ttl) != (label, ttl):
            session.label, session.ttl = label, ttl
            self.changed(session)

    def activate(self, session: Session, name: str) -> None:
        """Makes `name` the session's active adapter."""
        if session.active != name:
            session.active = name
            self.changed(session)

    def find(self, session_id: str) -> Session | None:
        """The live session of that id, renewed, or None."""
        session = self._sessions.get(session_id)
        if session is None or not self._lives(session) or session.tenant != caller().tenant:
            return None
        session.last_call = self._clock()
        return session

    def get(self, session_id: str) -> Session:
        """The live session of that id, renewed.

        Raises:
            NotFound: SESSION_NOT_FOUND.
        """
        session = self.find(session_id)
        if session is None:
            raise NotFound(
                "SESSION_NOT_FOUND",
                "session_id names no live session: it was closed, or its ttl ran out without a call; open a new one "
                "with OpenSession, and keep it alive with KeepAlive",
                field="session_id",
            )
        return session

    @contextlib.contextmanager
    def use(self, session_id: str) -> Iterator[Session | None]:
        """Keeps a session alive for as long as the block runs; None for the empty id.

        Raises:
            NotFound: SESSION_NOT_FOUND.
        """
        if not session_id:
            yield None
            return
        session = self.get(session_id)
        session.in_flight += 1
        try:
            yield session
        finally:
            session.in_flight -= 1
            session.last_call = self._clock()

    def holder(self, name: str) -> Session | None:
        """The live session that holds the lease of `name`."""
        session = self._holders.get(name)
        return session if session is not None and self._lives(session) else None

    def check_free(self, session: Session | None, name: str) -> None:
        """Refuses a lease that another session holds.

        Raises:
            Aborted: ADAPTER_LEASED, with retry_after: what remains of the holder's ttl.
        """
        holder = self.holder(name)
        if holder is not None and holder is not session:
            raise Aborted(
                "ADAPTER_LEASED",
                f"{holder.who} holds the lease of adapter {name_of(name)!r}: use another adapter, or wait until that "
                "session closes or ends",
                retry_after=self._remaining(holder),
            )

    def take(self, session: Session, name: str) -> None:
        """Gives `session` the lease of `name`, if nobody else holds it.

        Raises:
            Aborted: ADAPTER_LEASED, with retry_after: what remains of the holder's ttl.
        """
        self.check_free(session, name)
        if self.holder(name) is None:
            self.drop(name)  # a dead session may still be written down as its holder
            self._holders[name] = session
            session.leases[name] = None
            self.changed(session)
            log.info("%s leases adapter %s", session.who, name)

    def require(self, session: Session | None, name: str) -> None:
        """Sees to it that `session` may change `name`: it holds the lease, or takes it if nobody does.

        Without a session, nobody else may hold it.

        Raises:
            PermissionDenied: NOT_LEASE_HOLDER.
        """
        holder = self.holder(name)
        if holder is not None and holder is not session:
            raise PermissionDenied(
                "NOT_LEASE_HOLDER",
                f"{holder.who} holds the lease of adapter {name_of(name)!r}, and only it may train, replace or delete "
                "it: wait until that session closes or ends, or use an adapter of your own",
            )
        if session is not None:
            self.take(session, name)

    def drop(self, name: str) -> None:
        """Takes the lease of `name` from whoever holds it: the adapter is gone."""
        holder = self._holders.pop(name, None)
        if holder is not None:
            holder.leases.pop(name, None)
            if holder.session_id in self._sessions:
                self.changed(holder)
            self.given_back(name)

    def close(self, session_id: str) -> None:
        """Ends a session and gives its leases back.

        Raises:
            NotFound: SESSION_NOT_FOUND.
        """
        self._end(self.get(session_id), "closed")

    def sweep(self) -> None:
        """Ends the sessions whose ttl ran out."""
        for session in list(self._sessions.values()):
            if not self._lives(session):
                self._end(session, "ended: its ttl ran out")

    def live(self) -> list[Session]:
        """The live sessions that the caller may see, oldest first: its tenant's; the operator sees all."""
        tenant = caller().tenant
        return [one for one in self._sessions.values() if self._lives(one) and tenant in (one.tenant, OPERATOR)]

    def age(self, session: Session) -> float:
        """Seconds since it was opened."""
        return self._clock() - session.opened

    def idle(self, session: Session) -> float:
        """Seconds since its last call; 0 while a request is in flight."""
        return 0.0 if session.in_flight else self._clock() - session.last_call

    def _end(self, session: Session, how: str) -> None:
        del self._sessions[session.session_id]
        for name in list(session.leases):
            self.drop(name)
        self.ended(session)
        log.info("%s %s", session.who, how)

    def _lives(self, session: Session) -> bool:
        return session.session_id in self._sessions and self._remaining(session) > 0

    def _remaining(self, session: Session) -> float:
        return session.ttl - self.idle(session)
