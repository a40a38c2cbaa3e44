"""The audit log where it cannot be written, and who may read it; what its lines say is in test_tenants."""

from __future__ import annotations

import json
import logging

import pytest
from server.harness import refused
from server.tenants import Guarded

from onebase.server.audit import AuditLog, Record
from onebase.server.identity import Scope
from onebase.v1 import adapters_pb2, server_pb2, sessions_pb2

Create = adapters_pb2.CreateAdapterRequest
INFO = server_pb2.GetServerInfoRequest()
REFUSED = Record("/onebase.v1.ServerService/GetStatus", outcome="UNAUTHENTICATED")


@pytest.fixture
def logged(tmp_path):
    """A server whose audit log lies in a directory of its own."""
    (tmp_path / "logs").mkdir()
    with Guarded(tmp_path, security={"audit_log": tmp_path / "logs" / "audit.jsonl"}) as server:
        yield server


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_that_cannot_be_written_changes_no_answer_and_is_told_once(logged, tmp_path, caplog):
    red, path = logged.as_("red"), tmp_path / "logs" / "audit.jsonl"
    path.parent.rename(tmp_path / "away")
    assert red.adapters.CreateAdapter(Create(name="p")).name == "p"
    refusal = refused(logged.server.GetServerInfo, INFO)
    assert refusal.reason == "TOKEN_MISSING"
    assert "audit" not in refusal.message
    path.parent.mkdir()
    red.adapters.CreateAdapter(Create(name="q"))
    assert [line["adapter"] for line in lines(path)] == ["q"]
    told = [record for record in caplog.records if record.name == "onebase.server.audit"]
    assert [record.levelno for record in told] == [logging.ERROR, logging.WARNING]
    assert "2 lines were lost" in told[1].getMessage()


def test_a_full_disk_is_no_error_of_the_call_either(tmp_path, capfd):
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit._handler.stream.close()
    audit._handler.stream = open("/dev/full", "a")  # noqa: SIM115
    audit.write(REFUSED)
    audit.close()
    assert "Traceback" not in capfd.readouterr().err


def test_after_a_rotation_the_log_is_its_owners_alone(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path)
    for _ in range(2):
        audit.write(REFUSED)
        assert path.stat().st_mode & 0o777 == 0o600
        path.rename(tmp_path / "older")
    audit.close()


def test_who_is_refused_is_in_the_line_where_it_is_known(logged, tmp_path):
    for client, reason in (
        (logged.as_("red", seconds=-1), "TOKEN_EXPIRED"),
        (logged.as_("blue", Scope.REWARD), "SCOPE_MISSING"),
    ):
        assert refused(client.server.GetStatus, server_pb2.GetStatusRequest()).reason == reason
    expired, closed = lines(tmp_path / "logs" / "audit.jsonl")
    known = {one.tenant: one.id for one in logged.file.read().values()}
    assert (expired["tenant"], expired["token"]) == ("red", known["red"])
    assert (closed["tenant"], closed["token"]) == ("blue", known["blue"])


def test_the_request_id_that_opens_a_session_is_as_secret_as_its_id(logged, tmp_path):
    red = logged.as_("red")
    session = red.sessions.OpenSession(sessions_pb2.OpenSessionRequest(request_id="opening")).session_id
    red.adapters.CreateAdapter(Create(session_id=session, name="p", request_id="making"))
    found = [(line["method"].split("/")[-1], line["request_id"]) for line in lines(tmp_path / "logs" / "audit.jsonl")]
    assert found == [("OpenSession", ""), ("CreateAdapter", "making")]
    assert session not in (tmp_path / "logs" / "audit.jsonl").read_text()


def test_a_guessed_secret_names_nobody(logged, tmp_path):
    token = logged.make("red")
    metadata = (("authorization", f"Bearer {token}x"),)
    refused(logged.server.GetServerInfo, INFO, metadata=metadata)
    (line,) = lines(tmp_path / "logs" / "audit.jsonl")
    assert (line["tenant"], line["token"], line["reason"]) == ("", "", "TOKEN_UNKNOWN")
