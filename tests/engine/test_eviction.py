"""Adapters leave device memory when nothing needs them, and come back bit for bit when something does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.conftest import BASE as MODEL
from engine.conftest import POLICIES, Run, generation, perturb, texts
from engine.test_mixed import row, train_rows
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from onebase.server import jobs
from onebase.server.config import Budget, EngineConfig, Limits
from onebase.server.engine import Engine, open_engine
from onebase.server.errors import Cancelled, DataLoss, DeadlineExceeded, NotFound, OnebaseError, Unavailable
from onebase.server.jobs import (
    AdamW,
    AdapterFacts,
    AdapterMemory,
    CreateAdapterJob,
    DeleteAdapterJob,
    DescribeAdaptersJob,
    DropGradientsJob,
    EvictAdapterJob,
    ForwardBackwardJob,
    Job,
    LoraSpec,
    OptimStepJob,
    PpoLoss,
    SaveAdapterJob,
    ScoreJob,
    adapters_of,
)
from onebase.server.worker import Worker


class Disk:
    """Where evicted adapters are; readings wait while it is `held`, and fail with `broken`."""

    def __init__(self, folder: Path, submit: Run) -> None:
        self.folder = folder
        self.submit = submit
        self.readings: list[int] = []
        self.broken: Exception | None = None
        self._free = threading.Event()
        self._free.set()

    def evict(self, uid: int, version: int | None = None) -> AdapterFacts:
        """Saves and evicts an adapter."""
        path = self.folder / f"{uid}-{len(list(self.folder.iterdir()))}"
        saved = self.submit(SaveAdapterJob(adapter=uid, path=path, with_optimizer=True))

        @contextlib.contextmanager
        def opened() -> Iterator[Path]:
            self.readings.append(uid)
            assert self._free.wait(30)
            if self.broken is not None:
                raise self.broken
            yield path

        version = saved.version if version is None else version
        facts: AdapterFacts = self.submit(EvictAdapterJob(adapter=uid, version=version, open=opened))
        return facts

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def wait_reading(self, count: int = 1) -> None:
        until = time.monotonic() + 20
        while len(self.readings) < count:
            assert time.monotonic() < until
            time.sleep(0.005)


@pytest.fixture
def disk(tmp_path: Path, run: Run) -> Disk:
    return Disk(tmp_path, run)


def train(run: Run, uid: int, seed: int = 0) -> Any:
    result = run(ForwardBackwardJob(adapter=uid, rows=train_rows(seed), loss=PpoLoss()))
    run(OptimStepJob(adapter=uid, adamw=AdamW(learning_rate=0.01)))
    return result


def state(engine: Engine, uid: int) -> dict[str, torch.Tensor]:
    """Every number of an adapter."""
    adapter = engine.adapters[uid]
    found = {f"weights.{name}": tensor.detach() for name, tensor in adapter.weights.parameters().items()}
    if adapter.moments is not None:
        found |= {"step": torch.tensor(adapter.moments.step)}
        found |= {f"avg.{name}": tensor for name, tensor in adapter.moments.exp_avg.items()}
        found |= {f"sq.{name}": tensor for name, tensor in adapter.moments.exp_avg_sq.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_comes_back_is_what_went(run: Run, engine: Engine, disk: Disk) -> None:
    train(run, 1)
    before, facts = state(engine, 1), run(DescribeAdaptersJob())[1]
    tokens = texts(1)[0]
    scored = run(ScoreJob(rows=[row(1, tokens)]))
    serial = engine.adapters[1].weights.serial
    gone = disk.evict(1)
    assert not gone.resident
    assert gone.memory == AdapterMemory()
    assert 1 not in engine.adapters
    there = run(DescribeAdaptersJob())[1]
    assert (there.version, there.lora, there.parameter_count, there.value_head) == (
        facts.version,
        facts.lora,
        facts.parameter_count,
        facts.value_head,
    )
    assert not disk.readings
    again = run(ScoreJob(rows=[row(1, tokens)]))
    np.testing.assert_array_equal(again.rows[0].logprobs, scored.rows[0].logprobs)
    np.testing.assert_array_equal(again.rows[0].values, scored.rows[0].values)
    assert again.versions == scored.versions == {1: 1}
    assert same(state(engine, 1), before)
    assert engine.adapters[1].weights.serial == serial  # what the cache keeps of prompts is still of these numbers
    back = run(DescribeAdaptersJob())[1]
    assert back.resident
    assert back.memory == facts.memory


def test_memory_is_freed_as_soon_as_it_is_gone(run: Run, engine: Engine, disk: Disk) -> None:
    import weakref

    train(run, 1)
    job, _ = generation(1, [texts(1)[0][:4]])
    run(job)
    tensors = [weakref.ref(tensor) for tensor in engine.adapters[1].weights.parameters().values()]
    assert all(tensor() is not None for tensor in tensors)
    disk.evict(1)
    assert all(tensor() is None for tensor in tensors)


def test_the_version_is_that_of_the_evicted_one_where_the_checkpoint_says_less(
    run: Run, engine: Engine, disk: Disk
) -> None:
    engine.adapters[1].weights.version = 7
    disk_version = disk.evict  # writes version 7
    path = disk.folder / "older"
    engine.adapters[1].weights.version = 3
    run(SaveAdapterJob(adapter=1, path=path, with_optimizer=True))
    engine.adapters[1].weights.version = 7
    run(EvictAdapterJob(adapter=1, version=7, open=lambda: contextlib.nullcontext(path)))
    assert run(ScoreJob(rows=[row(1, texts(1)[0])])).versions == {1: 7}
    disk_version(1)
    newer = disk.folder / "newer"
    run(ScoreJob(rows=[row(1, texts(1)[0])]))
    engine.adapters[1].weights.version = 9
    run(SaveAdapterJob(adapter=1, path=newer))
    engine.adapters[1].weights.version = 7
    run(EvictAdapterJob(adapter=1, version=7, open=lambda: contextlib.nullcontext(newer)))
    with pytest.raises(OnebaseError, match="policy_1"):  # and no other version is passed off as this one
        run(ScoreJob(rows=[row(1, texts(1)[0])]))


def test_rewards_and_critics_come_back_with_their_heads(run: Run, engine: Engine, disk: Disk) -> None:
    reward = MODEL.parent / "reward"
    job = jobs.LoadAdapterJob(uid=8, name="r", kind=jobs.AdapterKind.REWARD, path=reward, append_eos=True)
    run(job)
    run(CreateAdapterJob(uid=9, name="c", lora=LoraSpec(), value_head=True, kind=jobs.AdapterKind.CRITIC, init_from=8))
    asked = ScoreJob(rows=[jobs.ScoreRow(8, texts(1)[0], score=True), jobs.ScoreRow(9, texts(1)[0], 3, values=True)])
    facts = [run(DescribeAdaptersJob())[uid] for uid in (8, 9)]
    scores = run(asked)
    assert not disk.evict(8).resident
    assert not disk.evict(9).resident
    again = run(ScoreJob(rows=asked.rows))
    np.testing.assert_array_equal(again.rows[0].scores, scores.rows[0].scores)
    np.testing.assert_array_equal(again.rows[1].values, scores.rows[1].values)
    for before, after in zip(facts, (run(DescribeAdaptersJob())[uid] for uid in (8, 9)), strict=True):
        assert (after.append_eos, after.pooling, after.num_labels, after.memory) == (
            before.append_eos,
            before.pooling,
            before.num_labels,
            before.memory,
        )


def test_nothing_that_is_needed_is_evicted(worker: Worker, run: Run, engine: Engine, disk: Disk) -> None:
    with pytest.raises(NotFound):
        run(EvictAdapterJob(adapter=99, version=0, open=contextlib.nullcontext))
    assert disk.evict(1, version=5).resident  # another version
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    assert disk.evict(1).resident  # its gradients are nowhere else
    run(DropGradientsJob(adapter=1))
    assert not disk.evict(1).resident
    go, inside = threading.Event(), threading.Event()
    generating, _ = generation(2, [texts(1)[0][:4]], max_new_tokens=30, ignore_eos=True, stream_tokens=True)
    emit = generating.emit

    def wait(chunk: jobs.CompletionChunk) -> None:
        emit(chunk)
        inside.set()
        assert go.wait(30)

    generating.emit = wait
    worker.submit(generating)
    assert inside.wait(30)
    running = EvictAdapterJob(adapter=2, version=0, open=contextlib.nullcontext)
    queued = EvictAdapterJob(adapter=3, version=0, open=contextlib.nullcontext)
    for job in (ScoreJob(rows=[row(3, texts(1)[0])]), running, queued):
        worker.submit(job)
    go.set()
    assert running.done.result(30).resident
    assert queued.done.result(30).resident
    generating.done.result(30)


def test_jobs_wait_in_their_order_for_one_reading_and_the_others_go_on(
    worker: Worker, run: Run, engine: Engine, disk: Disk
) -> None:
    disk.evict(1)
    disk.evict(2)
    ended: list[str] = []

    def submit(name: str, job: Job[Any]) -> Job[Any]:
        job.done.add_done_callback(lambda _: ended.append(name))
        worker.submit(job)
        return job

    with disk.held():
        parked = [
            submit("pass", ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss())),
            submit("step", OptimStepJob(adapter=1, adamw=AdamW(learning_rate=0.01), expected_pending=1)),
            submit("pass 2", ForwardBackwardJob(adapter=1, rows=train_rows(2), loss=PpoLoss(), expected_version=1)),
            submit("both", ScoreJob(rows=[row(1, texts(1)[0]), row(2, texts(1)[0])])),
            submit("drop", DropGradientsJob(adapter=1)),
        ]
        disk.wait_reading(2)
        run(ScoreJob(rows=[row(3, texts(1)[0])]))
        train(run, 3)
        assert not ended
        assert sum(worker.status().waiting.values()) == len(parked)
        assert worker.stuck_seconds() == 0
        assert run(DescribeAdaptersJob())[1].resident is False
    for job in parked:
        job.done.result(30)
    assert sorted(disk.readings) == [1, 2]
    assert [name for name in ended if name != "both"] == ["pass", "step", "pass 2", "drop"]
    assert engine.adapters[1].pending == 0
    assert sum(worker.status().waiting.values()) == 0


def test_a_parked_job_is_cancelled_and_has_its_deadline(worker: Worker, disk: Disk) -> None:
    disk.evict(1)
    with disk.held():
        cancelled = ScoreJob(rows=[row(1, texts(1)[0])])
        late = ScoreJob(rows=[row(1, texts(1)[0])], deadline=time.monotonic() + 0.1)
        stays = ScoreJob(rows=[row(1, texts(1)[0])], deadline=time.monotonic() + 60)
        for job in (cancelled, late, stays):
            worker.submit(job)
        disk.wait_reading()
        cancelled.cancel()
        with pytest.raises(Cancelled):
            cancelled.done.result(5)
        with pytest.raises(DeadlineExceeded):
            late.done.result(5)
    assert stays.done.result(30).versions == {1: 0}


def test_a_reading_that_fails_fails_those_who_wait_and_the_next_one_tries_again(
    worker: Worker, run: Run, disk: Disk, engine: Engine
) -> None:
    train(run, 1)
    before = state(engine, 1)
    disk.evict(1)
    disk.broken = DataLoss("CHECKPOINT_DAMAGED", "a file is not what was written", field="path")
    with disk.held():
        waiting = [
            ScoreJob(rows=[row(1, texts(1)[0])]),
            SaveAdapterJob(adapter=1, path=disk.folder / "x"),
            DropGradientsJob(adapter=1),
        ]
        for job in waiting:
            worker.submit(job)
        disk.wait_reading()
    for job in waiting[:2]:
        with pytest.raises(DataLoss, match=r"'policy_1' is not in memory.* not what was written") as caught:
            job.done.result(30)
        assert (caught.value.reason, caught.value.field) == ("CHECKPOINT_DAMAGED", "")
    assert not waiting[2].done.result(30).resident  # there was nothing to drop
    assert run(ScoreJob(rows=[row(2, texts(1)[0])])).versions == {2: 0}
    disk.broken = None
    assert run(ScoreJob(rows=[row(1, texts(1)[0])])).versions == {1: 1}
    assert same(state(engine, 1), before)


def test_an_evicted_adapter_is_deleted_without_reading_it(worker: Worker, run: Run, disk: Disk, engine: Engine) -> None:
    disk.evict(1)
    run(DeleteAdapterJob(adapter=1))
    assert not disk.readings
    assert 1 not in run(DescribeAdaptersJob())
    disk.evict(2)
    with disk.held():
        waiting = ScoreJob(rows=[row(2, texts(1)[0])])
        worker.submit(waiting)
        disk.wait_reading()
        deleting = DeleteAdapterJob(adapter=2)
        worker.submit(deleting)
        run(DescribeAdaptersJob())
        assert not deleting.done.done()
    assert waiting.done.result(5).versions == {2: 0}  # it came before
    deleting.done.result(5)
    run(ScoreJob(rows=[row(3, texts(1)[0])]))
    assert 2 not in engine.adapters
    assert 2 not in engine.absent


def test_a_copy_is_made_of_one_that_must_come_back_first(run: Run, disk: Disk, engine: Engine) -> None:
    weights = state(engine, 1)
    disk.evict(1)
    run(CreateAdapterJob(uid=9, name="copy", lora=LoraSpec(), value_head=True, init_from=1))
    assert same({name: tensor for name, tensor in state(engine, 9).items() if "weights" in name}, weights)


def test_what_waits_when_the_server_stops_is_told_so(engine: Engine, worker: Worker, disk: Disk) -> None:
    disk.evict(1)
    with disk.held():
        waiting = ScoreJob(rows=[row(1, texts(1)[0])])
        worker.submit(waiting)
        disk.wait_reading()
        stopping = threading.Thread(target=worker.stop, args=(0.0,))
        stopping.start()
        with pytest.raises(Unavailable):
            waiting.done.result(10)
    stopping.join(30)
    assert not stopping.is_alive()


def test_saves_and_drops_are_no_use_and_calls_are(run: Run, engine: Engine, tmp_path: Path) -> None:
    def idle() -> float:
        seconds: float = run(DescribeAdaptersJob())[1].idle_seconds
        return seconds

    engine.adapters[1].used -= 100
    run(SaveAdapterJob(adapter=1, path=tmp_path / "x"))
    run(DropGradientsJob(adapter=1))
    assert idle() > 99
    run(ScoreJob(rows=[row(1, texts(1)[0])]))
    assert idle() < 99


def test_every_job_that_names_an_adapter_is_known_to_name_it() -> None:
    kinds = [kind for kind in vars(jobs).values() if isinstance(kind, type) and issubclass(kind, Job)]
    for kind in set(kinds) - {EvictAdapterJob}:
        if "adapter" in kind.__dataclass_fields__:
            job = kind.__new__(kind)
            job.adapter = 5
            assert adapters_of(job) == {5}, kind
    assert adapters_of(ScoreJob(rows=[row(0, texts(1)[0]), row(4, texts(1)[0])])) == {4}


# ---------------------------------------------------------------------------------------- any order of anything

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("score", "generate", "pass", "step", "evict", "delete", "both")), st.sampled_from(POLICIES)
    ),
    min_size=1,
    max_size=14,
)


class Server:
    """A worker that plays a list of actions, with evictions or without."""

    def __init__(self, folder: Path, *, evicts: bool) -> None:
        self.engine = open_engine(EngineConfig(model=str(MODEL), threads=1, kv_slots=8))
        self.worker = Worker(self.engine, Limits(), Budget(256, 256))
        self.worker.start()
        self.disk = Disk(folder, self.run)
        self.evicts = evicts
        folder.mkdir()

    def run(self, job: Job[Any]) -> Any:
        self.worker.submit(job)
        return job.done.result(60)

    def play(self, actions: list[tuple[str, int]]) -> list[Any]:
        """Submits jobs without waiting for the ones before, but where steps and deletions would race with what reads.

        Returns what each of them was answered.
        """
        for uid in self.run(DescribeAdaptersJob()):
            self.run(DeleteAdapterJob(adapter=uid))
        for uid in POLICIES:
            spec = LoraSpec(rank=2 * uid, alpha=8.0)
            self.run(CreateAdapterJob(uid=uid, name=f"policy_{uid}", lora=spec, value_head=True, seed=uid))
            perturb(self.engine, uid)
        answers: list[Any] = []
        waiting: list[tuple[Job[Any], Any]] = []
        for number, (action, uid) in enumerate(actions):
            if action in ("step", "delete"):
                answers += [self.answer(*one) for one in waiting]
                waiting = []
            if action == "evict":
                if self.evicts:
                    with contextlib.suppress(NotFound):
                        self.disk.evict(uid)
            else:
                job, chunks = self.job(action, uid, number)
                self.worker.submit(job)
                waiting.append((job, chunks))
            if action == "step":
                answers.append(self.answer(*waiting.pop()))
        answers += [self.answer(*one) for one in waiting]
        return answers

    def job(self, action: str, uid: int, number: int) -> tuple[Job[Any], Any]:
        text = texts(2, number)
        match action:
            case "score":
                return ScoreJob(rows=[row(uid, text[0])]), None
            case "both":
                return ScoreJob(rows=[row(uid, text[0]), row(uid % 3 + 1, text[1])]), None
            case "generate":
                return generation(uid, [text[0][:4]], n=2, max_new_tokens=4, seed=number, values=True)
            case "pass":
                return ForwardBackwardJob(adapter=uid, rows=train_rows(number, 2), loss=PpoLoss()), None
            case "step":
                return OptimStepJob(adapter=uid, adamw=AdamW(learning_rate=0.01)), None
            case _:
                return DeleteAdapterJob(adapter=uid), None

    def answer(self, job: Job[Any], chunks: Any) -> Any:
        """All that a client is told."""
        try:
            result = job.done.result(60)
        except OnebaseError as error:
            return type(error).__name__, error.reason, error.message
        match result:
            case jobs.ScoreResult():
                return [(one.logprobs.tobytes(), one.values.tobytes()) for one in result.rows]
            case jobs.ForwardBackwardResult():
                arrays = (*result.logprobs, *result.entropy, *result.values)
                return dict(result.metrics), [array.tobytes() for array in arrays]
            case jobs.OptimStepResult():
                return result.version, result.grad_norm, result.gradients_applied
            case _:
                return (
                    None
                    if chunks is None
                    else {place: [c.tokens + c.logprobs + c.values for c in parts] for place, parts in chunks.items()}
                )

    def numbers(self) -> dict[int, dict[str, torch.Tensor]]:
        """Every number of every adapter, those that are away too."""
        for uid in list(self.engine.absent):
            self.run(ScoreJob(rows=[row(uid, texts(1)[0])]))
        return {uid: state(self.engine, uid) for uid in self.engine.adapters}


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """One that evicts, and one that does not."""
    both = Server(tmp_path / "evicts", evicts=True), Server(tmp_path / "stays", evicts=False)
    yield both
    for server in both:
        server.worker.stop(0.0)


def test_whatever_is_evicted_when_every_answer_is_that_of_a_server_that_never_evicts(
    servers: tuple[Server, Server],
) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(actions=ACTIONS)
    @example(
        actions=[
            (action, 1) for action in ("pass", "step", "evict", "pass", "generate", "step", "evict", "both", "score")
        ]
    )
    def play(actions: list[tuple[str, int]]) -> None:
        evicts, stays = (server.play(actions) for server in servers)
        assert evicts == stays
        evicting, staying = (server.numbers() for server in servers)
        assert evicting.keys() == staying.keys()
        assert all(same(evicting[uid], staying[uid]) for uid in evicting)

    play()
    assert len(servers[0].disk.readings) > 5
    assert not servers[1].disk.readings
