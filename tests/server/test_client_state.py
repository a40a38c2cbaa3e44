"""Client state and checkpoints on demand over the wire, with a fake worker: who may, how much, and once."""

from __future__ import annotations

import grpc
import pytest
from server.harness import refused
from server.stateful import committed, create, step, version
from server.tenants import Guarded

from onebase.server.config import AdapterSource
from onebase.server.jobs import MAX_CLIENT_STATE, SaveAdapterJob
from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2

Checkpoint, Get = adapters_pb2.CheckpointAdapterRequest, adapters_pb2.GetClientStateRequest
Code = grpc.StatusCode


def leave(live, state, name="p"):
    adamw = training_pb2.AdamW(learning_rate=0.1)
    request = training_pb2.OptimStepRequest(session_id=live.session, adapter=name, adamw=adamw, client_state=state)
    return live.training.OptimStep(request)


def kept(live, name="p"):
    answer = live.adapters.GetClientState(Get(name=name))
    return answer.adapter.version, answer.client_state


def checkpoint(live, **more):
    return live.adapters.CheckpointAdapter(Checkpoint(session_id=live.session, name="p", **more)).adapter.version


def test_it_is_kept_and_told(serve):
    with serve() as live:
        create(live)
        assert kept(live) == (0, b"")
        leave(live, b"a")
        step(live)
        assert kept(live) == (1, b"a")
        refusal = refused(leave, live, bytes(MAX_CLIENT_STATE + 1))
        assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "client_state")
        assert (version(live), kept(live)) == (2, (1, b"a"))
        leave(live, bytes(MAX_CLIENT_STATE))
        refusal = refused(checkpoint, live, client_state=bytes(MAX_CLIENT_STATE + 1))
        assert (refusal.code, refusal.field) == (Code.INVALID_ARGUMENT, "client_state")


def test_a_checkpoint_on_demand_is_of_the_newest_version(serve):
    with serve() as live:
        made = create(live)
        assert made.durable_version == 0
        step(live)
        step(live)
        facts = live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p"))
        assert (facts.version, facts.durable_version) == (2, 0)
        assert checkpoint(live) == 2
        assert committed(live) == [2, 0]
        assert live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p")).durable_version == 2
        assert checkpoint(live) == 2  # which writes nothing
        assert committed(live) == [2, 0]


def test_a_checkpoint_with_another_state_takes_the_place_of_its_version_s(serve, tmp_path):
    with serve() as live:
        create(live)
        step(live)
        assert checkpoint(live, client_state=b"a") == 1
        assert checkpoint(live, client_state=b"b") == 1
        assert (committed(live), kept(live)) == ([1, 0], (1, b"b"))


def test_a_checkpoint_happens_once_also_over_a_restart(serve):
    with serve() as live:
        create(live)
        step(live)
        session = live.session
        assert checkpoint(live, request_id="c", client_state=b"a") == 1
        step(live)
        live.keeper._tracks.clear()  # as after kill -9
    with serve() as live:
        live.session = session
        saves = len(live.worker.executed)
        assert checkpoint(live, request_id="c", client_state=b"a") == 1
        assert not [job for job in live.worker.executed[saves:] if isinstance(job, SaveAdapterJob)]
        assert refused(checkpoint, live, request_id="c", client_state=b"b").reason == "REQUEST_ID_REUSED"


def test_only_who_holds_the_lease_replaces_it(serve):
    with serve() as live:
        create(live)
        leave(live, b"a")
        live.session = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
        assert refused(checkpoint, live, client_state=b"b").reason == "NOT_LEASE_HOLDER"
        assert checkpoint(live) == 1
        assert kept(live) == (1, b"a")


def test_a_full_disk_refuses_it_and_the_retry_makes_it_durable(serve):
    with serve() as live:
        create(live)
        step(live)
        live.worker.full = True
        assert refused(checkpoint, live, request_id="c").reason == "DISK_FULL"
        live.worker.full = False
        assert checkpoint(live, request_id="c") == 1


def test_without_a_state_nothing_can_be_made_durable(live, session):
    create_ = adapters_pb2.CreateAdapterRequest(session_id=session, name="q")
    assert not live.adapters.CreateAdapter(create_).HasField("durable_version")
    refusal = refused(live.adapters.CheckpointAdapter, Checkpoint(session_id=session, name="q"))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "NOT_DURABLE")


@pytest.mark.parametrize("adapters", [(), ("shared",)])
def test_nobody_else_reads_it(tmp_path, adapters):
    with Guarded(tmp_path, policies=(AdapterSource("shared", None),), roots=(tmp_path / "root",)) as server:
        red, blue = server.as_("red"), server.as_("blue", adapters=adapters)
        red.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="mine"))
        assert red.adapters.GetClientState(Get(name="mine")).client_state == b""
        hidden = refused(blue.adapters.GetClientState, Get(name="mine"))
        assert (hidden.code, hidden.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        assert refused(blue.adapters.CheckpointAdapter, Checkpoint(name="mine")).reason == "ADAPTER_NOT_FOUND"
        download = adapters_pb2.DownloadAdapterRequest(name="shared", with_optimizer=True)
        if adapters:  # a token that names the operator's adapter trains it, and so has left it there itself
            assert blue.adapters.GetClientState(Get(name="shared")).client_state == b""
        else:
            refusal = refused(blue.adapters.GetClientState, Get(name="shared"))
            assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "NOT_OWNER")
            assert refused(blue.adapters.CheckpointAdapter, Checkpoint(name="shared")).reason == "NOT_OWNER"
        list(blue.adapters.DownloadAdapter(download))
        saves = [job for job in server.worker.executed if isinstance(job, SaveAdapterJob)]
        assert saves[-1].with_client_state == bool(adapters)
