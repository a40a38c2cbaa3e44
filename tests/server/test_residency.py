"""Which adapters leave device memory and when: with a fake worker that lets them go, in one process."""

from __future__ import annotations

import json

import grpc
from server.harness import eventually, ids, refused
from server.stateful import committed, create, step, version

from onebase.server.config import AdapterSource
from onebase.server.jobs import EvictAdapterJob
from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, types_pb2


def adapter(live, name="p"):
    return live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name))


def score(live, name="p"):
    sequence = types_pb2.Sequence(prompt=types_pb2.Content(tokens=ids(5)), completion=types_pb2.Content(tokens=ids(6)))
    return live.inference.Logprob(inference_pb2.LogprobRequest(adapter=name, sequences=[sequence]))


def idle(live, name, seconds):
    live.worker._change(live.uid(name), idle_seconds=seconds)


def tick(live):
    """One look, and all that it begins."""

    async def look():
        await live.keeper.residency.look()
        await live.keeper.residency.close()

    import asyncio

    asyncio.run_coroutine_threadsafe(look(), live._loop).result(20)


def resident(live, *names):
    return [adapter(live, name).resident for name in names]


def test_what_nobody_used_for_long_leaves_and_comes_back_when_it_is_used(serve):
    with serve(evict_idle_seconds=600.0) as live:
        for name in "pq":
            create(live, name)
            step(live, name)
        idle(live, "p", 599)
        idle(live, "q", 601)
        tick(live)
        assert resident(live, "p", "q") == [True, False]
        assert committed(live, "q") == [1, 0]  # it was made durable first
        gone = adapter(live, "q")
        assert (gone.version, gone.memory.weights_bytes, gone.parameter_count) == (1, 0, 250)
        score(live, "q")
        tick(live)
        assert resident(live, "q") == [True]
        (path,) = live.worker.came_back
        assert json.loads((path / "onebase.json").read_bytes())["version"] == 1
        status = live.server.GetStatus(server_pb2.GetStatusRequest())
        assert all(one.resident for one in status.adapters)


def test_over_the_budget_the_least_recently_used_leave_first(serve):
    with serve(evict_idle_seconds=0.0, adapter_memory=2500) as live:  # each takes a little more than 1000
        for name, seconds in (("a", 30), ("b", 20), ("c", 10)):
            create(live, name)
            idle(live, name, seconds)
        tick(live)
        assert resident(live, "a", "b", "c") == [False, True, True]
        score(live, "a")
        idle(live, "c", 1000)
        tick(live)
        assert resident(live, "a", "b", "c") == [True, True, False]
        score(live, "c")
        for name in "abc":
            idle(live, name, 0.5)  # between two calls of a client
        tick(live)
        assert resident(live, "a", "b", "c") == [True, True, True]


def test_without_limits_nothing_leaves_and_nobody_is_asked(serve):
    with serve(evict_idle_seconds=0.0) as live:
        create(live)
        idle(live, "p", 1e9)
        live.on_loop(live.keeper.tick)
        tick(live)
        assert resident(live, "p") == [True]
        assert not [job for job in live.worker.submitted if isinstance(job, EvictAdapterJob)]


def test_what_the_settings_loaded_stays_and_so_does_what_waits_for_its_step(serve, tmp_path):
    (tmp_path / "r").mkdir()
    with serve(rewards=(AdapterSource("r", tmp_path / "r"),), evict_idle_seconds=1.0, adapter_memory=1) as live:
        create(live)
        live.worker._change(live.uid("p"), pending_gradients=1)
        idle(live, "r", 1000)
        idle(live, "p", 1000)
        tick(live)
        assert resident(live, "r", "p") == [True, True]
        live.worker._change(live.uid("p"), pending_gradients=0)
        tick(live)
        assert resident(live, "r", "p") == [True, False]


def test_what_a_vanished_trainer_left_is_saved_and_leaves_at_once(serve):
    with serve(evict_idle_seconds=600.0) as live:
        create(live)
        step(live)
        assert committed(live) == [0]
        live.on_loop(live.keeper.abandoned, "p")
        eventually(lambda: resident(live, "p") == [False])
        assert committed(live) == [1, 0]
        assert step(live).adapter.version == 2  # it is back, and goes on


def test_what_something_still_needs_leaves_later_unless_its_trainer_comes_back(serve):
    with serve(evict_idle_seconds=0.0) as live:
        for name in "pq":
            create(live, name)
            live.worker.busy.add(live.uid(name))
            live.on_loop(live.keeper.abandoned, name)
        eventually(
            lambda: len([j for j in live.worker.submitted if isinstance(j, EvictAdapterJob) and j.done.done()]) == 2
        )
        step(live, "q")
        live.worker.busy.clear()
        tick(live)
        assert resident(live, "p", "q") == [False, True]


def test_what_cannot_be_made_durable_stays_and_is_not_tried_every_second(serve):
    with serve(evict_idle_seconds=10.0) as live:
        create(live)
        step(live)
        live.worker.full = True
        idle(live, "p", 1000)
        saves = len(live.worker.submitted)
        for _ in range(3):
            tick(live)
        assert resident(live, "p") == [True]
        tried = [job for job in live.worker.submitted[saves:] if type(job).__name__ == "SaveAdapterJob"]
        assert len(tried) == 1
        live.worker.full = False


def test_damage_while_it_is_away_is_told(serve):
    with serve() as live:
        create(live)
        idle(live, "p", 1000)
        tick(live)
        (folder,) = (live.keeper.directory.path / "checkpoints").iterdir()
        (folder / "onebase.json").write_text("{}")
        refusal = refused(score, live)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "CHECKPOINT_DAMAGED")
        delete = adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="p")
        live.adapters.DeleteAdapter(delete)
        assert refused(version, live).reason == "ADAPTER_NOT_FOUND"


def test_at_a_start_only_what_a_session_leases_comes_into_memory(serve):
    with serve() as live:
        create(live, "leased")
        loose = adapters_pb2.CreateAdapterRequest(name="loose")
        live.adapters.CreateAdapter(loose)
    with serve() as live:
        assert resident(live, "leased", "loose") == [True, False]
        assert version(live, "loose") == 0
        score(live, "loose")
        assert len(live.worker.came_back) == 1
    with serve(evict_idle_seconds=0.0) as live:
        assert resident(live, "leased", "loose") == [True, True]


def test_the_keeper_looks_by_itself(serve):
    with serve() as live:
        create(live)
        idle(live, "p", 1000)
        eventually(lambda: resident(live, "p") == [False])
