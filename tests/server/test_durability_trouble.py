"""What is durable when the disk is full, slow, or held by another program: with a fake worker, in one process."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time

import grpc
from server.harness import eventually, refusal_of, refused
from server.stateful import committed, create, killed, killed_after, slow_disk, step, tokens, version

from onebase.server import checkpoints
from onebase.server.durability import AGAIN_SECONDS
from onebase.server.errors import Gone
from onebase.server.jobs import SaveAdapterJob
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2, types_pb2

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
ROWS = [types_pb2.Sequence(prompt=tokens(), completion=tokens())]


def failing(error):
    def fails(*_arguments):
        raise error

    return fails


def get_session(live, session_id):
    return live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session_id))


def forward(live, request_id="", name="p"):
    request = training_pb2.ForwardBackwardRequest(
        session_id=live.session,
        request_id=request_id,
        adapter=name,
        sequences=[training_pb2.TrainingSequence(sequence=ROWS[0])],
        cross_entropy=training_pb2.CrossEntropyLoss(),
    )
    return live.training.ForwardBackward(request)


# ----------------------------------------------------------------------------------------------------------- sessions


def test_a_session_that_cannot_be_kept_is_not_opened(serve, monkeypatch):
    with serve() as live:
        monkeypatch.setattr(live.keeper.store, "put_session", failing(FULL))
        opened = sessions_pb2.OpenSessionRequest(ttl_seconds=60)
        assert refused(live.sessions.OpenSession, opened).reason == "DISK_FULL"
        live_sessions = live.on_loop(lambda: len(live.edge.sessions.live()))
        assert live_sessions == 1  # none that nobody knows of


def test_who_asks_again_for_a_session_that_is_being_opened_gets_no_session_that_was_not(serve, monkeypatch):
    opened = sessions_pb2.OpenSessionRequest(ttl_seconds=60, request_id="it")
    with serve() as live:
        outcomes, write = iter([failing(FULL)] * 2), live.keeper.store.put_session
        monkeypatch.setattr(live.keeper.store, "put_session", lambda row: next(outcomes, write)(row))
        with slow_disk(live):
            calls = [live.sessions.OpenSession.future(opened) for _ in range(3)]
            eventually(lambda: len(live.on_loop(live.edge.sessions.live)) == 2)
            time.sleep(0.2)  # until all three wait for the disk
            assert not any(call.done() for call in calls)
        for call in calls:  # who fails ends the session that the others wait for; they try anew
            if call.exception(timeout=20) is None:
                assert get_session(live, call.result().session_id) == call.result()
            else:
                assert refusal_of(call.exception()).reason == "DISK_FULL"
        assert any(call.exception() is not None for call in calls)
        assert live.sessions.OpenSession(opened) == live.sessions.OpenSession(opened)


def test_what_a_full_disk_kept_from_a_session_is_written_before_anything_else_of_it_is_answered(
    serve, tmp_path, monkeypatch
):
    active = adapters_pb2.GetAdapterRequest(name="p")
    with serve() as live:
        create(live)
        other = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=60)).session_id
        with monkeypatch.context() as full:
            full.setattr(live.keeper.store, "put_session", failing(FULL))
            full.setattr(live.keeper.store, "end_session", failing(FULL))
            closing = sessions_pb2.CloseSessionRequest(session_id=live.session)
            assert refused(live.sessions.CloseSession, closing).reason == "DISK_FULL"
            taking = sessions_pb2.SetActiveAdapterRequest(session_id=other, ppo_adapter_name="p")
            assert refused(live.sessions.SetActiveAdapter, taking).reason == "DISK_FULL"
            assert live.adapters.GetAdapter(active).leased  # others' calls go on
        live.session, gone = other, live.session
        assert step(live, request_id="a").adapter.version == 1
        live.on_loop(live.keeper.tick)  # which also writes what nobody asks for any more
        eventually(lambda: not live.keeper._notes._unwritten)
        copy = killed(tmp_path)
    with serve(folder=copy) as live:
        assert get_session(live, other).ppo_adapter_name == "p"
        assert refused(get_session, live, gone).reason == "SESSION_NOT_FOUND"


def test_the_lease_that_comes_with_a_new_adapter_is_committed_with_its_answer(serve, tmp_path, monkeypatch):
    """Or a retry after a kill just then would be told that the adapter is leased, and anybody could have it."""
    with serve() as live:
        copies = killed_after(live, "add", tmp_path, monkeypatch)
        request = adapters_pb2.CreateAdapterRequest(session_id=live.session, request_id="once", name="p")
        answer = live.adapters.CreateAdapter(request)
        assert answer.leased
        session = live.session
    with serve(folder=copies[0]) as live:
        assert live.on_loop(lambda: live.edge.sessions.holder("p").session_id) == session
        assert live.adapters.CreateAdapter(request) == answer
        taking = sessions_pb2.SetActiveAdapterRequest(session_id=live.session, ppo_adapter_name="p")
        assert refused(live.sessions.SetActiveAdapter, taking).reason == "ADAPTER_LEASED"


# -------------------------------------------------------------------------------------------------------------- steps


def test_a_step_that_a_full_disk_keeps_from_being_durable_is_shown_to_nobody(serve, tmp_path):
    with serve(durability="step") as live:
        create(live)
        create(live, "q")
        forward(live)
        live.worker.full = True
        assert refused(step, live, "p", "a").reason == "DISK_FULL"
        reads = (
            (live.inference.Logprob, inference_pb2.LogprobRequest(adapter="p", sequences=ROWS)),
            (live.inference.Score, inference_pb2.ScoreRequest(ppo_adapter_name="p", sequences=ROWS, outputs=[1])),
        )
        for call, request in reads:
            refusal = refused(call, request)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
            assert refusal.retry_after
        assert version(live) == 0
        assert [one.version for one in live.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters] == [
            0,
            0,
        ]
        assert [one.version for one in live.server.GetStatus(server_pb2.GetStatusRequest()).adapters] == [0, 0]
        other = inference_pb2.LogprobRequest(adapter="q", sequences=ROWS)
        assert live.inference.Logprob(other).adapter.version == 0  # serving goes on
        copy = killed(tmp_path)
        live.worker.full = False
        assert step(live, "p", "a").adapter.version == 1
        assert version(live) == 1
        assert live.inference.Logprob(reads[0][1]).adapter.version == 1
    with serve(folder=copy, durability="step") as live:
        assert version(live) == 0


def test_a_pass_that_may_not_be_answered_yet_is_made_once(serve):
    with serve(durability="step") as live:
        create(live)
        live.worker.full = True
        assert refused(step, live, "p", "a").reason == "DISK_FULL"
        for _ in range(2):
            assert refused(forward, live, "pass").reason == "DISK_FULL"
        live.worker.full = False
        step(live, "p", "a")
        forward(live, "pass")
        assert live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p")).pending_gradients == 1


def test_a_step_that_was_not_durable_becomes_so_also_if_nobody_asks_again(serve):
    with serve(durability="step") as live:
        create(live)
        live.worker.full = True
        assert refused(step, live, "p", "a").reason == "DISK_FULL"
        live.worker.full = False
        live.clock.pass_(AGAIN_SECONDS)
        live.on_loop(live.keeper.tick)
        eventually(lambda: committed(live) == [1, 0])
        assert version(live) == 1


# ------------------------------------------------------------------------------------------------------- client state


def checkpoint(live, data, request_id):
    return live.adapters.CheckpointAdapter.future(
        adapters_pb2.CheckpointAdapterRequest(
            session_id=live.session, request_id=request_id, name="p", client_state=data
        )
    )


def test_client_states_that_wait_for_the_same_checkpoint_are_all_written(serve):
    with serve() as live:
        create(live)
        step(live)
        live.worker.hold(SaveAdapterJob)
        plain = adapters_pb2.CheckpointAdapterRequest(session_id=live.session, request_id="r", name="p")
        calls = [live.adapters.CheckpointAdapter.future(plain)]
        eventually(lambda: [track.saving for track in live.keeper._tracks.values()] != [None])
        for number, data in enumerate((b"A", b"B")):
            calls.append(checkpoint(live, data, f"r{number}"))
        live.worker.release()
        for call in calls:
            assert call.result(10).adapter.version == 1
        written = [job.client_state for job in live.worker.executed if isinstance(job, SaveAdapterJob)]
        assert written[-2:] == [b"A", b"B"]


def test_a_slower_checkpoint_of_a_step_does_not_take_the_place_of_a_later_client_state(serve, monkeypatch):
    with serve(durability="step") as live:
        create(live)
        put, passes, paths = live.keeper.directory.put, threading.Event(), []

        def slow(path, row, made):
            paths.append(path.name)
            if len(paths) == 1:
                passes.wait(10)
            return put(path, row, made)

        monkeypatch.setattr(live.keeper.directory, "put", slow)
        stepping = live.training.OptimStep.future(
            training_pb2.OptimStepRequest(
                session_id=live.session, adapter="p", adamw=training_pb2.AdamW(learning_rate=0.1), client_state=b"A"
            )
        )
        eventually(lambda: paths)
        assert checkpoint(live, b"B", "c").result(10).adapter.version == 1
        passes.set()
        stepping.result(10)
        rows = live.keeper._errands._store.submit(live.keeper.store.checkpoints).result()
        assert [row.folder for row in rows if row.version == 1] == [paths[1]]


# --------------------------------------------------------------------------------------------------------- the store


def test_a_store_that_another_program_holds_is_unavailable_and_the_retry_is_answered(serve, tmp_path):
    with serve(durability="step") as live:
        create(live)
        live.keeper._errands._store.submit(live.keeper.store._db.execute, "PRAGMA busy_timeout=10").result()
        with sqlite3.connect(tmp_path / "state" / "registry.sqlite", isolation_level=None) as shell:
            shell.execute("BEGIN IMMEDIATE")
            refusal = refused(step, live, "p", "a")
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_BUSY")
            assert refusal.retry_after
            shell.execute("ROLLBACK")
        shell.close()
        assert step(live, "p", "a").adapter.version == 1


def test_an_adapter_that_cannot_be_saved_at_the_end_keeps_no_other_from_it(serve):
    with serve() as live:
        for name in "pq":
            create(live, name)
            step(live, name)
        advance, uid = live.keeper.store.advance, live.uid("p")

        def broken(checkpoint, *arguments):
            if checkpoint.uid == uid:
                raise sqlite3.DatabaseError("malformed")
            return advance(checkpoint, *arguments)

        live.keeper.store.advance = broken
    with serve() as live:
        assert committed(live, "q")[0] == 1


def test_who_reads_a_checkpoint_while_its_adapter_is_replaced_looks_again(serve, tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    hashed, begun, passes = checkpoints._sha256, threading.Event(), threading.Event()

    def slow(path):
        if threading.current_thread().name == "reader":
            begun.set()
            passes.wait(10)
        return hashed(path)

    monkeypatch.setattr(checkpoints, "_sha256", slow)
    with serve() as live:
        create(live)
        uid, told = live.uid("p"), []

        def read():
            try:
                with live.keeper.opened(uid, live._loop):
                    told.append(None)
            except Exception as error:
                told.append(error)

        reader = threading.Thread(target=read, name="reader")
        reader.start()
        assert begun.wait(5)
        live.adapters.LoadAdapter(
            adapters_pb2.LoadAdapterRequest(
                session_id=live.session,
                name="p",
                path=str(tmp_path / "r"),
                kind=types_pb2.ADAPTER_KIND_POLICY,
                replace=True,
            )
        )
        eventually(lambda: not live.keeper._errands._asides)
        passes.set()
        reader.join()
        assert isinstance(told[0], Gone)
