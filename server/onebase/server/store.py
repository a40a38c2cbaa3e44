"""The registry on disk: which adapters there are, at which checkpoint, who leases them, and what was answered.

One SQLite file in WAL mode, synced with every commit (synchronous=FULL). What belongs together is one transaction: an
adapter's row, its checkpoint and the answers of the calls whose effects are in it.

Knows no adapter's content, no protobuf and no event loop. One thread at a time may use a store; every method may wait
for the disk, and raises OSError where that fails: ENOSPC when it is full, EBUSY while another program holds the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MAX_RESPONSES = 4096
"""So many answers of each tenant are kept; the oldest go first."""

MAX_ENDS = 4096
"""Of so many deleted adapters of each owner it is known how far they came; the oldest are forgotten first."""

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE adapters (
    name TEXT PRIMARY KEY, uid INTEGER NOT NULL UNIQUE, kind TEXT NOT NULL, reserved INTEGER NOT NULL,
    create_time REAL NOT NULL, source TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE checkpoints (
    folder TEXT PRIMARY KEY, uid INTEGER NOT NULL REFERENCES adapters(uid) ON DELETE CASCADE,
    version INTEGER NOT NULL, digest TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX checkpoints_of ON checkpoints (uid, version);
CREATE TABLE responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT, session TEXT NOT NULL, method TEXT NOT NULL, request TEXT NOT NULL,
    digest BLOB NOT NULL, response BLOB NOT NULL, UNIQUE (session, method, request)
);
CREATE TABLE sessions (
    session TEXT PRIMARY KEY, queue TEXT NOT NULL, label TEXT NOT NULL, ttl REAL NOT NULL, active TEXT NOT NULL,
    leases TEXT NOT NULL, tenant TEXT NOT NULL
) WITHOUT ROWID;
"""
_ENDS = """
CREATE TABLE ends (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    least_version INTEGER NOT NULL
);
"""
_OWNERS = """
ALTER TABLE responses ADD COLUMN owner TEXT GENERATED ALWAYS AS (substr(method, 1, instr(method, '/'))) VIRTUAL;
CREATE INDEX responses_of ON responses (owner, number);
"""
_OPENINGS = """
ALTER TABLE sessions ADD COLUMN request TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN digest BLOB NOT NULL DEFAULT x'';
"""
_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,  # a backup, or somebody's shell, holds the file
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}
"""What the operating system would have said."""

_STEPS = (_TABLES, _ENDS, _OWNERS, _OPENINGS)

SCHEMA = len(_STEPS)
"""Of the tables; an older one is brought up to it, and a store of a newer one is refused."""


@dataclass(frozen=True)
class AdapterRow:
    """An adapter. `reserved` is the highest version that it may have had before the server ended."""

    name: str  # with its tenant, if it has one: the registry's key
    uid: int
    kind: str
    create_time: float
    source: str
    reserved: int = 0


@dataclass(frozen=True)
class EndRow:
    """What an adapter leaves when it is deleted: the version that the next one of its name begins at."""

    name: str
    owner: str
    least_version: int


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint of the adapter `uid`: its directory's name, and the SHA-256 of the manifest in it."""

    folder: str
    uid: int
    version: int
    digest: str


@dataclass(frozen=True)
class ResponseRow:
    """What a call was answered; `digest` is the request's."""

    session: str
    method: str  # with its tenant before a slash, if it has one
    request: str
    digest: bytes
    response: bytes


@dataclass(frozen=True)
class SessionRow:
    """A session, without its times."""

    session: str
    queue: str
    label: str
    ttl: float
    active: str
    leases: tuple[str, ...]
    tenant: str
    request: str = ""  # the request_id of the call that began it
    digest: bytes = b""  # of that call's payload


class WrongStateError(Exception):
    """A store that this server cannot use; the message says why and what to do."""


class Store:
    """The tables of one state directory.

    Args:
        path: the SQLite file; made if it is not there.

    Raises:
        WrongStateError: it is no store of this schema.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            (schema,) = self._db.execute("PRAGMA user_version").fetchone()
            if schema < SCHEMA:
                missing = "".join(_STEPS[schema:])
                self._db.executescript(f"BEGIN; {missing} PRAGMA user_version={SCHEMA}; COMMIT;")
                schema = SCHEMA
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise WrongStateError(f"{path} cannot be read: {error}; give another directory") from error
        if schema != SCHEMA:
            self._db.close()
            raise WrongStateError(
                f"{path} has schema {schema}, and this server reads {SCHEMA}: use the version of onebase that wrote it"
            )

    def close(self) -> None:
        """Ends the use of the file; may be called twice."""
        self._db.close()

    # ------------------------------------------------------------------------------------------------- reading

    def meta(self, key: str) -> str:
        """A fact about the whole state, "" if it was never set."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""

    @property
    def last_uid(self) -> int:
        """The highest uid that any adapter of this state has had."""
        return int(self.meta("last_uid") or 0)

    def adapters(self) -> list[AdapterRow]:
        """All adapters, by uid."""
        rows = self._db.execute("SELECT name, uid, kind, create_time, source, reserved FROM adapters ORDER BY uid")
        return [AdapterRow(*row) for row in rows]

    def checkpoints(self, uid: int | None = None) -> list[CheckpointRow]:
        """The checkpoints of an adapter, or all of them; the newest first."""
        rows = self._db.execute("SELECT folder, uid, version, digest FROM checkpoints ORDER BY version DESC, folder")
        return [one for one in (CheckpointRow(*row) for row in rows) if uid is None or one.uid == uid]

    def ends(self) -> list[EndRow]:
        """What deleted adapters have left, the oldest first."""
        rows = self._db.execute("SELECT name, owner, least_version FROM ends ORDER BY number")
        return [EndRow(*row) for row in rows]

    def responses(self) -> list[ResponseRow]:
        """The answers, the oldest first."""
        rows = self._db.execute("SELECT session, method, request, digest, response FROM responses ORDER BY number")
        return [ResponseRow(*row) for row in rows]

    def sessions(self) -> list[SessionRow]:
        """The sessions."""
        rows = self._db.execute(
            "SELECT session, queue, label, ttl, active, leases, tenant, request, digest FROM sessions ORDER BY session"
        )
        return [
            SessionRow(session, queue, label, ttl, active, tuple(json.loads(leases)), tenant, request, digest)
            for session, queue, label, ttl, active, leases, tenant, request, digest in rows
        ]

    # ------------------------------------------------------------------------------------------------- writing

    def set_meta(self, key: str, value: str) -> None:
        """Sets a fact about the whole state."""
        with self._transaction():
            self._set_meta(key, value)

    def add(
        self,
        adapter: AdapterRow,
        checkpoint: CheckpointRow,
        responses: Sequence[ResponseRow] = (),
        session: SessionRow | None = None,
    ) -> list[str]:
        """A new adapter, in the place of any other of its name, and the session that gets its lease.

        Returns the directories that nobody needs any more.
        """
        with self._transaction():
            dropped = self._remove(adapter.name)
            self._add_adapter(adapter)
            self._set_meta("last_uid", str(max(self.last_uid, adapter.uid)))
            self._add_checkpoint(checkpoint)
            self._add_responses(responses)
            if session is not None:
                self._put_session(session)
        return dropped

    def advance(self, checkpoint: CheckpointRow, keep: int, responses: Sequence[ResponseRow] = ()) -> list[str]:
        """A later checkpoint of an adapter, of which only the newest `keep` stay; of none if the adapter is gone.

        It takes the place of one of the same version, which had another state of the client's. Returns the directories
        that nobody needs any more.
        """
        with self._transaction():
            self._add_responses(responses)
            if not self._db.execute("SELECT 1 FROM adapters WHERE uid = ?", (checkpoint.uid,)).fetchone():
                return [checkpoint.folder]
            before = self.checkpoints(checkpoint.uid)
            dropped = [one.folder for one in before if one.version == checkpoint.version]
            kept = [checkpoint, *(one for one in before if one.version != checkpoint.version)]
            kept.sort(key=lambda one: one.version, reverse=True)
            dropped += [one.folder for one in kept[keep:]]
            self._add_checkpoint(checkpoint)
            self._db.executemany("DELETE FROM checkpoints WHERE folder = ?", [(folder,) for folder in dropped])
        return dropped

    def remove(self, end: EndRow, responses: Sequence[ResponseRow] = ()) -> list[str]:
        """Forgets an adapter, if it is there; returns the directories that nobody needs any more."""
        with self._transaction():
            self._add_responses(responses)
            self._db.execute(
                "INSERT OR REPLACE INTO ends (name, owner, least_version) VALUES (?, ?, ?)",
                (end.name, end.owner, end.least_version),
            )
            self._db.execute(
                "DELETE FROM ends WHERE number IN "
                "(SELECT number FROM ends WHERE owner = ? ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (end.owner, MAX_ENDS),
            )
            return self._remove(end.name)

    def answer(self, *responses: ResponseRow) -> None:
        """Notes what calls were answered whose effect is not in here, or is in here already."""
        with self._transaction():
            self._add_responses(responses)

    def adopt(
        self, adapters: Sequence[AdapterRow], checkpoints: Sequence[CheckpointRow], meta: Mapping[str, str]
    ) -> None:
        """Takes in what the lost store of another state has had, and facts about the whole state, all or nothing."""
        with self._transaction():
            for adapter in adapters:
                self._add_adapter(adapter)
            for checkpoint in checkpoints:
                self._add_checkpoint(checkpoint)
            for key, value in meta.items():
                self._set_meta(key, value)

    def go_back(self, uid: int, reserved: int, newer: Sequence[str], meta: Mapping[str, str]) -> None:
        """Forgets checkpoints of an adapter that may have had versions up to this one, and sets facts about the state.

        All of that or nothing: what is not forgotten is what the adapter goes on from.
        """
        with self._transaction():
            self._db.execute("UPDATE adapters SET reserved = ? WHERE uid = ?", (reserved, uid))
            self._db.executemany("DELETE FROM checkpoints WHERE folder = ?", [(folder,) for folder in newer])
            for key, value in meta.items():
                self._set_meta(key, value)

    def reserve(self, uid: int, version: int) -> None:
        """Notes that an adapter may have had versions up to this one."""
        with self._transaction():
            self._db.execute("UPDATE adapters SET reserved = ? WHERE uid = ?", (version, uid))

    def put_session(self, row: SessionRow) -> None:
        """Notes a session as it is now."""
        with self._transaction():
            self._put_session(row)

    def drop_lost_leases(self) -> None:
        """Takes from sessions the leases of adapters that are not there.

        A session's row is written after the commit that deletes the adapter, and a kill may come between the two.
        """
        there = {adapter.name for adapter in self.adapters()}
        kept = [(row, tuple(key for key in row.leases if key in there)) for row in self.sessions()]
        with self._transaction():
            for row, leases in kept:
                if leases != row.leases:
                    self._put_session(replace(row, leases=leases))

    def end_session(self, session: str) -> None:
        """Forgets a session."""
        with self._transaction():
            self._db.execute("DELETE FROM sessions WHERE session = ?", (session,))

    # ---------------------------------------------------------------------------------------------- in a transaction

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            number = _ERRNO.get(error.sqlite_errorcode & 0xFF)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(self._path)) from error

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _add_adapter(self, row: AdapterRow) -> None:
        self._db.execute(
            "INSERT INTO adapters (name, uid, kind, create_time, source, reserved) VALUES (?, ?, ?, ?, ?, ?)",
            (row.name, row.uid, row.kind, row.create_time, row.source, row.reserved),
        )

    def _put_session(self, row: SessionRow) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.session,
                row.queue,
                row.label,
                row.ttl,
                row.active,
                json.dumps(row.leases),
                row.tenant,
                row.request,
                row.digest,
            ),
        )

    def _add_checkpoint(self, row: CheckpointRow) -> None:
        self._db.execute(
            "INSERT INTO checkpoints (folder, uid, version, digest) VALUES (?, ?, ?, ?)",
            (row.folder, row.uid, row.version, row.digest),
        )

    def _add_responses(self, rows: Sequence[ResponseRow]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO responses (session, method, request, digest, response) VALUES (?, ?, ?, ?, ?)",
            [(row.session, row.method, row.request, row.digest, row.response) for row in rows],
        )
        for method in {row.method for row in rows}:  # of its tenant's own: many of one push out no other's
            owner = method[: method.find("/") + 1]
            self._db.execute(
                "DELETE FROM responses WHERE owner = ? AND number <= "
                "(SELECT number FROM responses WHERE owner = ? ORDER BY number DESC LIMIT 1 OFFSET ?)",
                (owner, owner, MAX_RESPONSES),
            )

    def _remove(self, name: str) -> list[str]:
        found = self._db.execute(
            "SELECT folder FROM checkpoints JOIN adapters USING (uid) WHERE name = ? ORDER BY folder", (name,)
        ).fetchall()
        self._db.execute("DELETE FROM adapters WHERE name = ?", (name,))
        return [folder for (folder,) in found]
