"""What is durable when, and what a server takes up again: with a fake worker, in one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
import pytest
from server.fakes import FACTS
from server.harness import eventually, refused
from server.stateful import committed, create, killed, killed_after, slow_disk, step, version

from onebase.server.config import AdapterSource, ConfigError
from onebase.server.durability import RESERVED_VERSIONS
from onebase.server.jobs import AdapterKind, LoadAdapterJob
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2, types_pb2


def test_each_step_is_durable_before_it_is_answered_and_only_the_newest_checkpoints_stay(serve, tmp_path):
    with serve(durability="step", keep=2) as live:
        create(live)
        for number in range(1, 5):
            step(live)
            assert committed(live)[0] == number
        eventually(lambda: len(list((tmp_path / "state" / "checkpoints").iterdir())) == 2)
        assert committed(live) == [4, 3]


def test_a_step_that_can_still_be_lost_is_seen_by_nobody(serve):
    """A version that was read must not be given again with other numbers, as it would be after a kill just now."""
    tokens = types_pb2.Content(tokens=types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=[1], data=bytes(8)))
    rows = [types_pb2.Sequence(prompt=tokens, completion=tokens)]
    with serve(durability="step") as live:
        create(live)
        create(live, "q")
        adamw = training_pb2.AdamW(learning_rate=0.1)
        with slow_disk(live):
            stepping = live.training.OptimStep.future(
                training_pb2.OptimStepRequest(session_id=live.session, adapter="p", adamw=adamw)
            )
            eventually(lambda: [track.newest for track in live.keeper._tracks.values()] == [1, 0])  # it is made
            reads = [
                live.adapters.GetAdapter.future(adapters_pb2.GetAdapterRequest(name="p")),
                live.adapters.ListAdapters.future(adapters_pb2.ListAdaptersRequest()),
                live.server.GetStatus.future(server_pb2.GetStatusRequest()),
                live.inference.Logprob.future(inference_pb2.LogprobRequest(adapter="p", sequences=rows)),
                live.inference.Score.future(
                    inference_pb2.ScoreRequest(ppo_adapter_name="p", sequences=rows, outputs=[1])
                ),
            ]
            other = inference_pb2.LogprobRequest(adapter="q", sequences=rows)
            assert live.inference.Logprob(other, timeout=10).adapter.version == 0  # who is at rest waits for nobody
            time.sleep(0.3)
            assert [call.done() for call in (stepping, *reads)] == [False] * 6
        assert stepping.result(10).adapter.version == 1
        got, listed, status, logprob, scored = (call.result(10) for call in reads)
        shown = [got.version, listed.adapters[0].version, status.adapters[0].version]
        assert [*shown, logprob.adapter.version, scored.policy.version] == [1] * 5


def test_an_active_adapter_is_durable_before_the_call_that_set_it_is_answered(serve):
    with serve(rewards=(AdapterSource("r", Path("r")),)) as live:
        create(live)
        tokens = types_pb2.Content(tokens=types_pb2.Tensor(dtype=types_pb2.DTYPE_INT64, shape=[1], data=bytes(8)))
        request = inference_pb2.RewardRequest(
            session_id=live.session,
            ppo_adapter_name="p",
            sequences=[types_pb2.Sequence(prompt=tokens, completion=tokens)],
        )
        with slow_disk(live):
            asked = live.inference.Reward.future(request)
            time.sleep(0.3)
            assert not asked.done()
        assert asked.result(10).ppo_adapter_name == "p"


def test_a_cancel_between_a_change_and_its_answer_does_not_lose_the_answer(serve):
    """The change is made and the session's new leases are on their way to the disk: the retry finds the answer."""
    with serve() as live:
        create(live)
        passes, reached, put = threading.Event(), threading.Event(), live.keeper.store.put_session

        def slow(row):
            reached.set()
            passes.wait(20)
            put(row)

        live.keeper.store.put_session = slow
        request = adapters_pb2.DeleteAdapterRequest(session_id=live.session, request_id="once", name="p")
        call = live.adapters.DeleteAdapter.future(request)
        assert reached.wait(10)
        call.cancel()
        time.sleep(0.2)  # until the server has heard of it
        passes.set()
        assert live.adapters.DeleteAdapter(request, timeout=10) == adapters_pb2.DeleteAdapterResponse()


def test_otherwise_every_so_many_steps(serve):
    with serve(steps=3) as live:
        create(live)
        step(live)
        step(live)
        assert committed(live) == [0]
        step(live)
        eventually(lambda: committed(live) == [3, 0])


def test_or_so_many_seconds_after_a_step_that_was_not_saved(serve):
    with serve(seconds=30.0) as live:
        create(live)
        live.clock.pass_(31)
        live.on_loop(live.keeper.tick)
        assert committed(live) == [0]  # nothing to save
        step(live)
        live.clock.pass_(29)
        live.on_loop(live.keeper.tick)
        assert committed(live) == [0]
        live.clock.pass_(1)
        live.on_loop(live.keeper.tick)
        eventually(lambda: committed(live) == [1, 0])


def test_or_when_the_lease_ends_or_the_server_stops(serve):
    with serve() as live:
        create(live)
        step(live)
        live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=live.session))
        eventually(lambda: committed(live) == [1, 0])
        live.session = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
        step(live)
    with serve() as live:
        assert committed(live) == [2, 1]
        assert version(live) == 2


def test_versions_that_may_have_been_seen_are_not_given_again(serve):
    with serve() as live:
        create(live)
        create(live, "idle")
        step(live)
        session = live.session
        live.keeper._tracks.clear()  # as after kill -9: nothing is saved at the end
    for _ in range(2):  # also where nothing is done between two restarts
        with serve() as live:
            assert version(live) == RESERVED_VERSIONS + 1
            assert version(live, "idle") == 0
    with serve() as live:
        live.session = session
        step(live)
    with serve() as live:
        assert version(live) == RESERVED_VERSIONS + 2


def test_a_disk_that_is_full_refuses_a_step_until_its_retry_makes_it_durable(serve):
    with serve(durability="step") as live:
        create(live)
        live.worker.full = True
        for _ in range(2):
            refusal = refused(step, live, request_id="a")
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
            assert refusal.retry_after
        live.worker.full = False
        assert step(live, request_id="a").adapter.version == 1
        assert committed(live) == [1, 0]
        assert version(live) == 1
    with serve(durability="step") as live:
        assert version(live) == 1


def test_what_cannot_be_made_durable_is_not_made(serve):
    with serve() as live:
        live.worker.full = True
        assert refused(create, live).reason == "DISK_FULL"
        assert refused(version, live).reason == "ADAPTER_NOT_FOUND"
        eventually(lambda: not live.worker.adapters)
        live.worker.full = False
        create(live)


def test_a_uid_is_never_used_twice(serve):
    with serve() as live:
        create(live, "a")
        create(live, "b")
        uid = live.uid("b")
        for name in "ab":
            live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=live.session, name=name))
    with serve() as live:
        create(live, "a")
        assert live.uid("a") > uid


@pytest.mark.parametrize("durability", ["step", "checkpoint"])
def test_a_name_never_has_a_version_twice_not_even_over_a_deletion_and_a_restart(serve, durability):
    with serve(durability=durability) as live:
        create(live)
        create(live, "other")
        step(live)
        step(live)
        live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="p"))
    for first in (3, 4):
        with serve(durability=durability) as live:
            create(live)
            assert version(live) == first
            live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="p"))
            create(live, "new")
            assert version(live, "new") == 0 if first == 3 else 1
            live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="new"))


def test_adapters_of_every_kind_come_back_but_for_what_the_settings_read_anew(serve, tmp_path):
    (tmp_path / "r").mkdir()
    flag = AdapterSource("flagged", tmp_path / "r")

    def load(live, name):
        request = adapters_pb2.LoadAdapterRequest(name=name, path="r", kind=types_pb2.ADAPTER_KIND_REWARD)
        return live.adapters.LoadAdapter(request)

    with serve(rewards=(flag,)) as live:
        loaded = load(live, "mine")
    with serve(rewards=(flag, AdapterSource("other", tmp_path / "r")), evict_idle_seconds=0.0) as live:
        there = {
            adapter.name: adapter for adapter in live.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
        }
        assert set(there) == {"mine", "flagged", "other"}
        assert there["mine"] == loaded
        paths = [job.path for job in live.worker.submitted if isinstance(job, LoadAdapterJob)]
        assert [path == tmp_path / "r" for path in paths] == [False, True, True]
    with serve(rewards=(AdapterSource("mine", tmp_path / "r"),)) as live:
        assert live.edge.registry.get("mine", "name").kind is AdapterKind.REWARD
    with serve() as live:
        assert live.on_loop(live.edge.registry.find, "mine") is None


def test_a_policy_of_the_settings_goes_on_from_the_state_and_must_be_of_its_kind(serve, tmp_path):
    named = (AdapterSource("p", None),)
    with serve(policies=named) as live:
        step(live)
    with serve(policies=named) as live:
        assert version(live) == 1
    for wrong in ({"rewards": (AdapterSource("p", tmp_path),)}, {"restore": (("q", 1),)}, {"restore": (("p", 7),)}):
        with pytest.raises(ConfigError, match=r"adapter is 'p'|restore is"), serve(**wrong):
            pass


def test_a_session_that_was_opened_before_a_kill_is_given_to_the_retry_after_it(serve, tmp_path):
    begun = sessions_pb2.OpenSessionRequest(ttl_seconds=60, request_id="it")
    request = sessions_pb2.OpenSessionRequest(ppo_adapter_name="p", ttl_seconds=60, request_id="it")
    with serve() as live:
        create(live)
        live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=live.session))
        opened = live.sessions.OpenSession(request)
        copy = killed(tmp_path)
    with serve(folder=copy) as live:
        assert live.sessions.OpenSession(request) == opened
        assert refused(live.sessions.OpenSession, begun).reason == "REQUEST_ID_REUSED"


def test_a_lease_does_not_outlive_its_adapter_over_a_kill_between_the_two(serve, tmp_path, monkeypatch):
    deleting = adapters_pb2.DeleteAdapterRequest(name="p", request_id="it")
    with serve() as live:
        create(live)
        held = deleting.session_id = live.session
        copies = killed_after(live, "remove", tmp_path, monkeypatch)
        live.adapters.DeleteAdapter(deleting)
    with serve(folder=copies[0]) as live:
        live.adapters.DeleteAdapter(deleting)  # is answered as it was
        before = live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=held))
        assert list(before.leases) == []
        create(live)  # by another session, whose it is now
        step(live)
        live.session = held
        assert refused(step, live).reason == "NOT_LEASE_HOLDER"


def test_sessions_come_back_with_a_whole_ttl_and_ended_ones_do_not(serve):
    with serve() as live:
        create(live)
        session, over = live.session, live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=5))
        live.clock.pass_(50)
        live.on_loop(live.edge.sessions.sweep)
    with serve() as live:
        live.clock.pass_(59)
        assert live.sessions.GetSession(sessions_pb2.GetSessionRequest(session_id=session)).leases == ["p"]
        gone = sessions_pb2.GetSessionRequest(session_id=over.session_id)
        assert refused(live.sessions.GetSession, gone).reason == "SESSION_NOT_FOUND"
        queues = [one.queue for one in live.on_loop(live.edge.sessions.live)]
        assert len(set(queues)) == len(queues)


def test_the_state_of_another_base_is_refused(serve):
    from dataclasses import replace

    with serve():
        pass
    with pytest.raises(ConfigError, match="belongs to the base 'fake'"), serve(replace(FACTS, fingerprint="0" * 64)):
        pass
