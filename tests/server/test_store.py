"""The store agrees with a model of it, through any sequence of changes and reopenings."""

from __future__ import annotations

import errno
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from onebase.server.store import (
    _STEPS,
    AdapterRow,
    CheckpointRow,
    EndRow,
    ResponseRow,
    SessionRow,
    Store,
    WrongStateError,
)

NAMES = st.sampled_from(["a", "b", "c"])
SESSIONS = st.sampled_from(["s1", "s2"])
KEEP = 2


class StoreMachine(RuleBasedStateMachine):
    """Plain dictionaries beside a store that is closed and opened at any moment."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.adapters: dict[str, AdapterRow] = {}
        self.checkpoints: dict[int, list[CheckpointRow]] = {}
        self.responses: dict[tuple[str, str], ResponseRow] = {}
        self.sessions: dict[str, SessionRow] = {}
        self.ends: dict[str, EndRow] = {}
        self.uid = self.made = 0

    @initialize()
    def begin(self):
        self.store = Store(Path(self.folder.name, "db"))

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    def answer(self, session):
        self.made += 1
        row = ResponseRow(session, "M", f"r{self.made % 5}", bytes([self.made % 251]), b"x" * (self.made % 3))
        self.responses.pop((row.session, row.request), None)
        self.responses[row.session, row.request] = row
        return row

    def checkpoint(self, uid, version):
        self.made += 1
        return CheckpointRow(f"{uid}-{self.made:04d}", uid, version, f"d{self.made}")

    @rule()
    def reopen(self):
        self.store.close()
        self.begin()

    @rule(name=NAMES, session=SESSIONS)
    def add(self, name, session):
        self.uid += 1
        row = AdapterRow(name, self.uid, "policy", self.uid / 7, "made", reserved=0)
        checkpoint = self.checkpoint(self.uid, 0)
        old = self.adapters.get(name)
        gone = [one.folder for one in self.checkpoints.pop(old.uid)] if old else []
        assert sorted(self.store.add(row, checkpoint, [self.answer(session)])) == sorted(gone)
        self.adapters[name], self.checkpoints[self.uid] = row, [checkpoint]

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), session=SESSIONS, ahead=st.integers(-1, 2))
    def advance(self, data, session, ahead):
        """Also a late one, which a newer one has overtaken, and one in the place of another of its version."""
        row = self.adapters[data.draw(st.sampled_from(sorted(self.adapters)))]
        known = self.checkpoints[row.uid]
        checkpoint = self.checkpoint(row.uid, max(0, known[0].version + ahead))
        gone = [one.folder for one in known if one.version == checkpoint.version]
        known[:] = [one for one in known if one.version != checkpoint.version] + [checkpoint]
        known.sort(key=lambda one: -one.version)
        gone += [one.folder for one in known[KEEP:]]
        del known[KEEP:]
        assert self.store.advance(checkpoint, KEEP, [self.answer(session)]) == gone

    @rule(session=SESSIONS)
    def advance_what_is_gone(self, session):
        checkpoint = self.checkpoint(999, 3)
        assert self.store.advance(checkpoint, KEEP, [self.answer(session)]) == [checkpoint.folder]

    @rule(name=NAMES, session=SESSIONS, least=st.integers(0, 9))
    def remove(self, name, session, least):
        old = self.adapters.pop(name, None)
        gone = [one.folder for one in self.checkpoints.pop(old.uid)] if old else []
        self.ends.pop(name, None)
        end = self.ends[name] = EndRow(name, "", least)
        assert sorted(self.store.remove(end, [self.answer(session)])) == sorted(gone)

    @rule(session=SESSIONS)
    def answer_only(self, session):
        self.store.answer(self.answer(session))

    @rule(name=NAMES, version=st.integers(0, 9))
    def reserve(self, name, version):
        if name in self.adapters:
            self.store.reserve(self.adapters[name].uid, version)
            self.adapters[name] = replace(self.adapters[name], reserved=version)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), reserved=st.integers(0, 9))
    def go_back(self, data, reserved):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        uid = self.adapters[name].uid
        chosen = data.draw(st.integers(0, len(self.checkpoints[uid]) - 1))
        newer = [one.folder for one in self.checkpoints[uid][:chosen]]
        del self.checkpoints[uid][:chosen]
        self.made += 1
        self.store.go_back(uid, reserved, newer, {"restores": str(self.made)})
        self.adapters[name] = replace(self.adapters[name], reserved=reserved)
        assert self.store.meta("restores") == str(self.made)

    @rule(session=SESSIONS, active=NAMES, leases=st.lists(NAMES, unique=True), request=st.sampled_from(["", "r"]))
    def put_session(self, session, active, leases, request):
        row = SessionRow(session, "q", "label", 1.5, active, tuple(leases), "red", request, request.encode())
        self.sessions[session] = row
        self.store.put_session(self.sessions[session])

    @rule()
    def drop_lost_leases(self):
        for row in self.sessions.values():
            leases = tuple(name for name in row.leases if name in self.adapters)
            self.sessions[row.session] = replace(row, leases=leases)
        self.store.drop_lost_leases()

    @rule(session=SESSIONS)
    def end_session(self, session):
        self.sessions.pop(session, None)
        self.store.end_session(session)

    @invariant()
    def agree(self):
        assert self.store.adapters() == sorted(self.adapters.values(), key=lambda row: row.uid)
        assert self.store.last_uid == self.uid
        for uid, rows in self.checkpoints.items():
            assert self.store.checkpoints(uid) == rows
        assert len(self.store.checkpoints()) == sum(map(len, self.checkpoints.values()))
        assert self.store.responses() == list(self.responses.values())
        assert self.store.ends() == list(self.ends.values())
        assert self.store.sessions() == sorted(self.sessions.values(), key=lambda row: row.session)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_every_commit_is_synced(tmp_path):
    store = Store(tmp_path / "db")
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    store.close()


def test_a_change_that_fails_leaves_nothing(tmp_path):
    store = Store(tmp_path / "db")
    row = AdapterRow("a", 1, "policy", 0.0, "")
    store.add(row, CheckpointRow("1-a", 1, 0, "d"))
    with pytest.raises(sqlite3.IntegrityError):  # the directory's name is taken
        store.add(AdapterRow("b", 2, "policy", 0.0, ""), CheckpointRow("1-a", 2, 0, "d"))
    assert store.adapters() == [row]
    assert store.last_uid == 1
    store.close()


def test_old_answers_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr("onebase.server.store.MAX_RESPONSES", 3)
    store = Store(tmp_path / "db")
    for number in range(5):
        store.remove(EndRow("nothing", "", 0), [ResponseRow("s", "M", f"r{number}", b"", b"")])
    assert [row.request for row in store.responses()] == ["r2", "r3", "r4"]
    store.close()


def test_many_answers_of_a_tenant_push_out_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("onebase.server.store.MAX_RESPONSES", 2)
    store = Store(tmp_path / "db")
    store.answer(ResponseRow("s", "M", "mine", b"", b""))
    store.answer(ResponseRow("s", "red/M", "hers", b"", b""))
    for number in range(5):
        store.answer(ResponseRow("s", "blue/M", f"r{number}", b"", b""))
    assert [row.request for row in store.responses()] == ["mine", "hers", "r3", "r4"]
    store.close()


def test_old_ends_make_room_for_those_of_their_owner(tmp_path, monkeypatch):
    monkeypatch.setattr("onebase.server.store.MAX_ENDS", 2)
    store = Store(tmp_path / "db")
    ends = [
        EndRow("red/a", "red", 3),
        EndRow("blue/a", "blue", 5),
        EndRow("red/b", "red", 4),
        EndRow("red/c", "red", 9),
    ]
    for end in ends:
        store.remove(end)
    assert store.ends() == ends[1:]
    store.close()


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_a_store_of_an_older_schema_is_brought_up(tmp_path, monkeypatch, schema):
    path = tmp_path / "db"
    row, answer = AdapterRow("a", 1, "policy", 0.0, ""), ResponseRow("s", "red/M", "r1", b"", b"")
    monkeypatch.setattr("onebase.server.store.SCHEMA", schema)
    monkeypatch.setattr("onebase.server.store._STEPS", _STEPS[:schema])
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO adapters VALUES ('a', 1, 'policy', 0, 0.0, '')")
        db.execute("INSERT INTO responses VALUES (7, 's', 'red/M', 'r1', x'', x'')")
        db.execute("INSERT INTO sessions VALUES ('s', 'q', 'label', 1.5, 'a', '[\"a\"]', 'red')")
    db.close()
    monkeypatch.undo()
    monkeypatch.setattr("onebase.server.store.MAX_RESPONSES", 1)
    store = Store(path)
    assert (store.adapters(), store.responses()) == ([row], [answer])
    assert store.sessions() == [SessionRow("s", "q", "label", 1.5, "a", ("a",), "red")]
    store.remove(EndRow("a", "", 8), [replace(answer, request="r2")])
    assert (store.ends(), store.responses()) == ([EndRow("a", "", 8)], [replace(answer, request="r2")])
    store.close()


def test_a_full_disk_is_told_as_one(tmp_path):
    store = Store(tmp_path / "db")
    store._db.execute("PRAGMA max_page_count=1")
    with pytest.raises(OSError, match="No space") as caught:
        store.remove(EndRow("nothing", "", 0), [ResponseRow("s", "M", "r", b"", b"x" * 100_000)])
    assert caught.value.errno == errno.ENOSPC
    assert store.responses() == []
    store.close()


def test_another_schema_and_no_store_at_all_are_refused(tmp_path):
    path = tmp_path / "db"
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(WrongStateError, match="schema 99"):
        Store(path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(WrongStateError, match="cannot be read"):
        Store(path)
