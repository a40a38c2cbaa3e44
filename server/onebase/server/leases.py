"""Sessions, their active adapters, and the leases they hold.

A lease is the right to train, replace or delete a policy or critic; one live session at most holds it. Leases go by the
adapter's key (`registry`), so they outlive a replacement of what the name means. A session is its tenant's: for others
it is not there. A session lives while its client attends it or it has requests in flight, and for its ttl after that.
Its id is its client's secret: no message and no log line shows it.

A client attends its session by a stream that lives as long as it does. When the last one breaks, the client has
vanished, until a call or another stream shows that it is back.

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from onebase.server.config import Limits
from onebase.server.errors import Aborted, NotFound, ResourceExhausted
from onebase.server.identity import OPERATOR, caller
from onebase.server.names import name_of
from onebase.server.store import SessionRow

log = logging.getLogger(__name__)

Clock = Callable[[], float]

MAX_STREAMS = 4
"""Most streams by which one session is attended at once: a client that comes back may be there before it is known that
its old connection is dead."""
DEAD_PEER_SECONDS = 8.0
"""A peer that is gone without a word is noticed after so long (`listening.server_options`)."""
_LONGEST_WAIT = 30.0  # seconds that a client is told to wait for another session to end


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
    streams: set[asyncio.Event] = field(default_factory=set, repr=False)
    """The streams that attend it: each is woken when something about it changes."""
    vanished: bool = False
    """Its client attended it, and is gone."""
    request: str = ""
    """The request_id of the call that began it, whose retry is given this session; "" if it has none."""
    digest: bytes = b""
    """Of that call's payload."""

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
        max_per_tenant: most of them that are one tenant's; 0 is no limit.
    """

    def __init__(
        self, clock: Clock = time.monotonic, *, max_sessions: int = Limits.max_sessions, max_per_tenant: int = 0
    ) -> None:
        self.given_back: Callable[[str], None] = lambda _name: None
        """Is told the name of each adapter whose lease ends."""
        self.changed: Callable[[Session], None] = lambda _session: None
        """Is told each session whose label, ttl, active adapter or leases are new."""
        self.ended: Callable[[Session], None] = lambda _session: None
        """Is told each session that ends."""
        self.abandoned: Callable[[str], None] = lambda _name: None
        """Is told the name of each adapter whose lease is held by a session whose client has vanished."""
        self._clock = clock
        self._max_sessions = max_sessions
        self._max_per_tenant = max_per_tenant
        self._dismissed = False
        self._sessions: dict[str, Session] = {}
        self._holders: dict[str, Session] = {}
        self._opened = 0

    def open(self, label: str, ttl: float, request: str = "", digest: bytes = b"") -> Session:
        """Begins a session without an active adapter, for a call of that request_id and payload.

        Raises:
            ResourceExhausted: TOO_MANY_SESSIONS; QUOTA_SESSIONS.
        """
        self.sweep()
        self._check_room()
        now = self._clock()
        self._opened += 1
        session = Session(secrets.token_hex(16), f"s{self._opened}", label, ttl, opened=now, last_call=now)
        session.tenant, session.request, session.digest = caller().tenant, request, digest
        self._sessions[session.session_id] = session
        self._tell(session)
        log.info("%s opened", session.who)
        return session

    def _check_room(self) -> None:
        tenant, there = caller().tenant, list(self._sessions.values())
        theirs = [one for one in there if one.tenant == tenant]
        if self._max_per_tenant and len(theirs) >= self._max_per_tenant:
            raise ResourceExhausted(
                "QUOTA_SESSIONS",
                f"{len(theirs)} sessions are open, and tenant {tenant!r} may have {self._max_per_tenant}: close some, "
                "or wait for some to end",
                retry_after=self._until_one_ends(theirs),
            )
        if len(there) >= self._max_sessions:
            raise ResourceExhausted(
                "TOO_MANY_SESSIONS",
                f"{len(there)} sessions are open, the most this server keeps: close some, or wait",
                retry_after=self._until_one_ends(there),
            )

    def _until_one_ends(self, sessions: Iterable[Session]) -> float:
        return min(_LONGEST_WAIT, *(self._remaining(one) for one in sessions))

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
                request=row.request,
                digest=row.digest,
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
            self._tell(session)

    def activate(self, session: Session, name: str) -> None:
        """Makes `name` the session's active adapter."""
        if session.active != name:
            session.active = name
            self._tell(session)

    def begun_by(self, request: str) -> Session | None:
        """The caller's live session that an earlier call of this request_id began, renewed; None for the empty id."""
        key = (caller().tenant, request)
        ids = [one.session_id for one in self._sessions.values() if (one.tenant, one.request) == key] if request else []
        return next(filter(None, map(self.find, ids)), None)

    def find(self, session_id: str) -> Session | None:
        """The live session of that id, renewed, or None."""
        session = self._sessions.get(session_id)
        if session is None or not self._lives(session) or session.tenant != caller().tenant:
            return None
        session.last_call = self._clock()
        if session.vanished:
            session.vanished = False
            log.info("%s: its client is back", session.who)
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
            if session.vanished and not session.in_flight:  # what its client left under way may have changed something
                self._abandon(session)

    @contextlib.contextmanager
    def attend(self, session_id: str) -> Iterator[tuple[Session, asyncio.Event]]:
        """Keeps a session alive for as long as its client shows that it is there.

        Gives the session, and what is set whenever it changes or ends, or when the server stops.

        Raises:
            NotFound: SESSION_NOT_FOUND.
            ResourceExhausted: TOO_MANY_STREAMS.
        """
        session, news = self.get(session_id), asyncio.Event()
        if len(session.streams) >= MAX_STREAMS:
            raise ResourceExhausted(
                "TOO_MANY_STREAMS",
                f"{MAX_STREAMS} streams attend this session, and one is enough: end some; those of a dead connection "
                "end by themselves",
                retry_after=DEAD_PEER_SECONDS,
            )
        session.streams.add(news)
        try:
            yield session, news
        finally:
            session.streams.discard(news)
            session.last_call = self._clock()
            if self.is_open(session) and not session.streams and not self._dismissed:
                session.vanished = True
                leases = ", ".join(session.leases) or "none"
                log.warning("%s: its client is gone; leases are kept for %g s: %s", session.who, session.ttl, leases)
                self._abandon(session)

    def dismiss(self) -> None:
        """Wakes what attends sessions: the server stops. Whose stream ends from here on has not vanished."""
        self._dismissed = True
        for session in self._sessions.values():
            _wake(session)

    def is_open(self, session: Session) -> bool:
        """Whether a session has not ended yet."""
        return session.session_id in self._sessions

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
            self._tell(session)
            log.info("%s leases adapter %s", session.who, name)

    def require(self, session: Session | None, name: str) -> None:
        """Sees to it that `session` may change `name`: it holds the lease, or takes it if nobody does.

        Without a session, nobody else may hold it.

        Raises:
            Aborted: NOT_LEASE_HOLDER, with retry_after: what remains of the holder's ttl.
        """
        holder = self.holder(name)
        if holder is not None and holder is not session:
            raise Aborted(
                "NOT_LEASE_HOLDER",
                f"{holder.who} holds the lease of adapter {name_of(name)!r}, and only it may train, replace or delete "
                "it: wait until that session closes or ends, or use an adapter of your own",
                retry_after=self._remaining(holder),
            )
        if session is not None:
            self.take(session, name)

    def drop(self, name: str) -> None:
        """Takes the lease of `name` from whoever holds it: the adapter is gone."""
        holder = self._holders.pop(name, None)
        if holder is not None:
            holder.leases.pop(name, None)
            if self.is_open(holder):
                self._tell(holder)
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
        _wake(session)
        log.info("%s %s", session.who, how)

    def _tell(self, session: Session) -> None:
        self.changed(session)
        _wake(session)

    def _abandon(self, session: Session) -> None:
        for name in session.leases:
            self.abandoned(name)

    def _lives(self, session: Session) -> bool:
        return self.is_open(session) and self._remaining(session) > 0

    def _remaining(self, session: Session) -> float:
        return session.ttl if session.streams else session.ttl - self.idle(session)


def _wake(session: Session) -> None:
    for news in session.streams:
        news.set()
