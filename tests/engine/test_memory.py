"""Memory that runs out: what can be run in smaller pieces is, to the bit; only what cannot be run even alone fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine.conftest import POLICIES, Run, generation, texts
from engine.test_mixed import row, train_rows
from engine.test_worker import block
from torch.utils._python_dispatch import TorchDispatchMode

from onebase.server import failpoints
from onebase.server.engine import Engine
from onebase.server.engine import kv as kv_module
from onebase.server.engine.batch import Batch
from onebase.server.errors import Internal, ResourceExhausted, Unavailable
from onebase.server.jobs import (
    BASE,
    AdamW,
    CreateAdapterJob,
    CrossEntropyLoss,
    ForwardBackwardJob,
    Job,
    LoraSpec,
    OptimStepJob,
    PpoLoss,
    SaveAdapterJob,
    ScoreJob,
)
from onebase.server.memory import is_out_of_memory, is_poison
from onebase.server.tasks import PassTask
from onebase.server.worker import Worker

FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
Fail = Callable[[str], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Arms failpoints."""
    monkeypatch.setattr(failpoints, "_hits", type(failpoints._hits)())

    def arm(wanted: str) -> None:
        failpoints._hits.clear()
        monkeypatch.setenv(failpoints.VARIABLE, wanted)

    return arm


class Device:
    """A device whose memory holds the activations of so many tokens; an error comes before or after the base ran."""

    def __init__(self, engine: Engine) -> None:
        self.tokens = 10**9
        self.failed = 0
        self.largest = 0
        self._run, self._late = engine.run, False

    def run(self, batch: Batch) -> torch.Tensor:
        tokens = sum(len(one.tokens) for one in batch.rows)
        self._late = not self._late
        if tokens > self.tokens and not self._late:
            self._fail()
        hidden = self._run(batch)
        if tokens > self.tokens:
            self._fail()
        self.largest = max(self.largest, tokens)
        return hidden

    def _fail(self) -> None:
        self.failed += 1
        raise RuntimeError(FULL)


@pytest.fixture
def device(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(engine)
    monkeypatch.setattr(engine, "run", device.run)
    return device


def bits(engine: Engine, uid: int) -> dict[str, bytes]:
    """Weights, moments and pending gradients of an adapter."""
    adapter = engine.adapters[uid]
    found = dict(adapter.weights.parameters())
    found |= {f"gradient {name}": tensor for name, tensor in adapter.gradients.items()}
    if adapter.moments is not None:
        found |= {f"first {name}": tensor for name, tensor in adapter.moments.exp_avg.items()}
        found |= {f"second {name}": tensor for name, tensor in adapter.moments.exp_avg_sq.items()}
        found["step"] = torch.tensor(adapter.moments.step)
    return {name: tensor.detach().numpy().tobytes() for name, tensor in found.items()}


def together(worker: Worker, jobs: list[Job[Any]]) -> list[Any]:
    """Results, or errors, of jobs that all wait when the first of their steps is planned."""
    go = block(worker)
    for job in jobs:
        worker.submit(job)
    go.set()
    return [job.done.exception(60) or job.done.result() for job in jobs]


def scores() -> list[Job[Any]]:
    return [ScoreJob(rows=[row(uid, one) for one in texts(3, seed=uid)], session=f"s{uid}") for uid in POLICIES]


def numbers(results: list[Any]) -> list[bytes]:
    return [one.logprobs.tobytes() + one.values.tobytes() for result in results for one in result.rows]


def clean(engine: Engine) -> None:
    """Nothing is left of what ran."""
    assert engine.kv.used == 0
    assert all(adapter.weights.readers == 0 for adapter in engine.adapters.values())


def test_a_step_that_is_too_large_is_run_in_halves_and_its_numbers_are_the_same_bits(
    worker: Worker, engine: Engine, device: Device
) -> None:
    def jobs() -> tuple[list[Job[Any]], list[Any]]:
        made = [generation(uid, texts(2, seed=uid), n=2, seed=uid, values=True) for uid in POLICIES]
        return [*scores(), *(job for job, _ in made)], [chunks for _, chunks in made]

    first, wanted = jobs()
    plain = numbers(together(worker, first)[:3])
    device.tokens, device.largest = 40, 0
    second, found = jobs()
    assert numbers(together(worker, second)[:3]) == plain
    assert found == wanted
    assert device.failed > 1
    assert 20 < device.largest <= 40
    clean(engine)


def test_only_the_job_that_cannot_be_run_even_alone_fails(worker: Worker, engine: Engine, device: Device) -> None:
    plain = numbers(together(worker, scores()))
    before = {uid: bits(engine, uid) for uid in POLICIES}
    long = texts(1, shortest=60, longest=61)[0]
    device.tokens = 40
    greedy = ScoreJob(rows=[row(1, texts(1)[0]), row(1, long)], session="greedy")
    training = ForwardBackwardJob(adapter=2, rows=[*train_rows(2), *long_rows(2)], loss=CrossEntropyLoss())
    results = together(worker, [*scores(), greedy, training])
    assert numbers(results[:3]) == plain
    for error, what in zip(results[3:], ("sequence of 60 tokens", "sequences of 60 tokens"), strict=True):
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "OUT_OF_MEMORY"
        assert what in error.message
        assert "4096 bytes" in error.message
        assert error.retry_after is None  # nobody else had memory that he will give back
    assert {uid: bits(engine, uid) for uid in POLICIES} == before
    assert all(adapter.pending == 0 for adapter in engine.adapters.values())
    clean(engine)


def long_rows(uid: int) -> list[Any]:
    """Rows of 60 tokens."""
    (one,) = train_rows(uid, count=1)
    more = np.full(60 - len(one.tokens), 7)
    longer = {
        name: None if value is None else np.concatenate([value, np.zeros(len(more), value.dtype)])
        for name, value in vars(one).items()
        if isinstance(value, np.ndarray) and name not in ("tokens", "mask")
    }
    mask = np.concatenate([one.mask, np.ones(len(more), bool)])
    return [type(one)(**{**vars(one), **longer, "tokens": np.concatenate([one.tokens, more]), "mask": mask})]


def test_a_prompt_is_cut_until_it_goes_through(worker: Worker, engine: Engine, device: Device, run: Run) -> None:
    prompt = texts(1, shortest=70, longest=71)
    job, wanted = generation(1, prompt, n=3, seed=5)
    run(job)
    engine.kv.forget()
    device.tokens, device.largest = 10, 0
    job, found = generation(1, prompt, n=3, seed=5)
    run(job)
    assert found == wanted
    assert device.largest <= 10
    clean(engine)


def test_passes_of_several_policies_are_taken_apart_and_their_gradients_are_the_same_bits(
    worker: Worker, engine: Engine, device: Device
) -> None:
    def passes() -> list[Job[Any]]:
        return [
            ForwardBackwardJob(adapter=uid, rows=train_rows(uid, count=2), loss=PpoLoss(), session=f"s{uid}")
            for uid in POLICIES
        ]

    together(worker, passes())
    wanted = {uid: bits(engine, uid) for uid in POLICIES}
    for adapter in engine.adapters.values():
        adapter.drop_gradients()
    device.tokens = max(sum(len(one.tokens) for one in job.rows) for job in passes())
    results = together(worker, passes())
    assert device.failed
    assert {uid: bits(engine, uid) for uid in POLICIES} == wanted
    assert [result.facts.pending_gradients for result in results] == [1, 1, 1]


def test_a_pass_is_cut_where_it_must_and_its_gradients_are_added_once(engine: Engine, device: Device, run: Run) -> None:
    job = ForwardBackwardJob(adapter=1, rows=train_rows(1, count=8), loss=PpoLoss())
    wanted = run(job)
    gradients = {name: g.numpy().copy() for name, g in engine.adapters[1].gradients.items()}
    engine.adapters[1].drop_gradients()
    device.tokens = 40
    found = run(ForwardBackwardJob(adapter=1, rows=train_rows(1, count=8), loss=PpoLoss()))
    failed = device.failed
    assert failed
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        np.testing.assert_array_equal(one, other)
    largest = max(float(np.abs(g).max()) for g in gradients.values())
    for name, gradient in engine.adapters[1].gradients.items():
        np.testing.assert_allclose(gradient.numpy(), gradients[name], rtol=0, atol=1e-5 * largest)
    assert engine.adapters[1].pending == 1
    assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5)


def test_pairs_stay_together_when_a_pass_is_cut() -> None:
    from onebase.server.jobs import DpoLoss

    rows = train_rows(1, count=8)
    task = PassTask(ForwardBackwardJob(adapter=1, rows=rows, loss=DpoLoss()), 10**6)
    assert task.next_rows() == 8
    while task.halve():
        assert task.next_rows() % 2 == 0
    assert task.next_rows() == 2
    left = 0
    while task.next_cost():
        left += task.next_rows()
        task.ran()
    assert left == 8


@contextlib.contextmanager
def small_cache(monkeypatch: pytest.MonkeyPatch, places: int) -> Iterator[None]:
    """Room for so many tokens in a layer of the key-value cache."""
    grow = kv_module._grow

    def within(old: Any, rows: int, capacity: int, like: torch.Tensor) -> torch.Tensor:
        if rows * capacity > places:
            raise RuntimeError(FULL)
        return grow(old, rows, capacity, like)

    with monkeypatch.context() as patched:
        patched.setattr(kv_module, "_grow", within)
        yield


@pytest.mark.parametrize("places", [128, 384])
def test_completions_take_turns_where_the_cache_cannot_grow(
    worker: Worker, engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    def jobs() -> tuple[list[Job[Any]], list[Any]]:
        made = [
            generation(uid, [one[:5] for one in texts(2, seed=uid)], n=2, seed=uid, max_new_tokens=80, ignore_eos=True)
            for uid in POLICIES
        ]
        return [job for job, _ in made], [chunks for _, chunks in made]

    first, wanted = jobs()
    together(worker, first)
    engine.kv.forget()
    with small_cache(monkeypatch, places):
        second, found = jobs()
        assert together(worker, second) == [None, None, None]
        assert engine.kv.allowed < engine.kv.slots
    assert found == wanted
    clean(engine)
    for seed in range(40):  # and when there is room again, it is used again
        run(generation(1, [texts(1)[0][:4]], seed=seed, max_new_tokens=60, ignore_eos=True)[0])
        if engine.kv.allowed == engine.kv.slots:
            return
    raise AssertionError(engine.kv.allowed)


def test_a_completion_for_which_there_is_no_room_even_alone_fails(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, wanted = generation(2, [texts(1)[0][:5]], n=2, seed=1, max_new_tokens=40, ignore_eos=True)
    together(worker, [short])
    engine.kv.forget()
    with small_cache(monkeypatch, 64):
        long, _ = generation(1, [texts(1)[0][:5]], n=2, max_new_tokens=80, ignore_eos=True)
        short, found = generation(2, [texts(1)[0][:5]], n=2, seed=1, max_new_tokens=40, ignore_eos=True)
        error, fine = together(worker, [long, short])
    assert fine is None
    assert found == wanted
    assert isinstance(error, ResourceExhausted)
    assert "a prompt of 65 tokens" in error.message or "a completion of 65 tokens" in error.message
    clean(engine)


@pytest.mark.parametrize("place", ["train:oom@1", "infer:oom@1,infer:oom@2,infer:oom@4", "share:oom@1"])
def test_an_error_wherever_it_comes_changes_no_number(
    worker: Worker, engine: Engine, fail: Fail, run: Run, place: str
) -> None:
    def jobs() -> tuple[list[Job[Any]], Any]:
        generating, chunks = generation(3, texts(1), n=3, seed=2)
        training = ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss())
        return [*scores(), generating, training], chunks

    first, wanted = jobs()
    plain = numbers(together(worker, first)[:3])
    gradients = bits(engine, 1)
    engine.adapters[1].drop_gradients()
    engine.kv.forget()
    second, found = jobs()
    go = block(worker)
    fail(place)
    for job in second:
        worker.submit(job)
    go.set()
    assert numbers([job.done.result(60) for job in second[:3]]) == plain
    second[3].done.result(60)
    second[4].done.result(60)
    assert failpoints._hits[place.partition(":")[0]] > place.count("@")
    assert found == wanted
    assert bits(engine, 1) == gradients
    clean(engine)


def test_an_optimizer_step_without_memory_changes_nothing_and_keeps_its_gradients(
    engine: Engine, run: Run, fail: Fail
) -> None:
    def step(uid: int) -> OptimStepJob:
        return OptimStepJob(adapter=uid, adamw=AdamW(1e-2), max_grad_norm=0.1)

    engine.version_window = 1  # so that a step writes into a copy
    for uid in (1, 2):
        run(ForwardBackwardJob(adapter=uid, rows=train_rows(1), loss=PpoLoss()))
    before = bits(engine, 1)
    fail("optimizer:oom@1,optimizer:oom@2")
    with pytest.raises(ResourceExhausted) as caught:
        run(step(1))
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert "gradients still wait" in caught.value.message
    assert bits(engine, 1) == before
    assert (engine.adapters[1].weights.version, engine.adapters[1].pending) == (0, 1)
    assert not engine.adapters[1].old
    stepped = run(step(1))
    assert (stepped.version, stepped.gradients_applied) == (1, 1)
    fail("optimizer:oom@1")  # what only saves time is given up first
    assert run(step(2)).version == 1


def test_an_optimizer_step_takes_no_memory_once_it_has_begun(
    engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func._schema.name.endswith("_") and "detach" not in str(func):
                self.made.append(str(func))
            return out

    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    adapter, watch = engine.adapters[1], Watch()
    drop = adapter.drop_gradients

    def begins() -> None:
        drop()
        watch.__enter__()

    monkeypatch.setattr(adapter, "drop_gradients", begins)
    try:
        adapter.step(AdamW(1e-2), max_grad_norm=0.1)
    finally:
        watch.__exit__(None, None, None)
    assert adapter.weights.version == 1
    assert watch.made == []


def test_a_step_that_is_made_and_cannot_be_copied_for_its_checkpoint_is_saved_by_its_retry(
    engine: Engine, run: Run, fail: Fail, tmp_path: Any
) -> None:
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    fail("snapshot:oom@1")
    stepped = run(OptimStepJob(adapter=1, adamw=AdamW(1e-2), save_to=tmp_path / "one"))
    assert stepped.version == 1
    with pytest.raises(ResourceExhausted) as caught:
        stepped.saved.result(30)
    assert caught.value.retry_after
    assert engine.adapters[1].weights.readers == 0
    assert run(SaveAdapterJob(adapter=1, path=tmp_path / "two", with_optimizer=True)).version == 1


def test_an_adapter_that_finds_no_memory_is_refused_and_another_is_made(engine: Engine, run: Run, fail: Fail) -> None:
    fail("files:oom@1,files:crash@2")
    for number, error in ((7, ResourceExhausted), (8, Internal)):  # whatever ends a thread ends its job alone
        with pytest.raises(error):
            run(CreateAdapterJob(uid=number, name="more", lora=LoraSpec(rank=2), value_head=True))
        assert number not in engine.adapters
    assert run(CreateAdapterJob(uid=9, name="more", lora=LoraSpec(rank=2), value_head=True)).version == 0


def test_no_thread_for_files_is_an_error_of_the_job(
    worker: Worker, engine: Engine, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def nothing(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker._files, "submit", nothing)
    with pytest.raises(ResourceExhausted):
        run(SaveAdapterJob(adapter=1, path=tmp_path / "one"))
    assert engine.adapters[1].weights.readers == 0
    assert run(scores()[0]).rows


def test_steps_are_smaller_for_a_while_after_memory_ran_out(worker: Worker, device: Device, run: Run) -> None:
    rows = [row(1, one) for one in texts(60)]
    device.tokens = 100
    run(ScoreJob(rows=rows))
    assert device.failed <= 6  # without learning, each of some ten steps would
    budget = worker._scheduler.step_tokens
    assert 16 <= budget <= 100
    device.tokens = 10**9
    run(ScoreJob(rows=rows))
    assert budget < worker._scheduler.step_tokens <= 256


# ------------------------------------------------------------------------------------------------------ a lost engine


@pytest.mark.parametrize("wanted", ["infer:crash", "infer:poison", "worker:bug", "worker:crash"])
def test_a_lost_engine_answers_everybody_and_does_nothing_more(
    worker: Worker, engine: Engine, fail: Fail, wanted: str
) -> None:
    jobs = [*scores(), generation(1, texts(1))[0]]
    if "worker" in wanted:  # otherwise it may be done before
        jobs.append(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    go = block(worker)
    fail(wanted)
    for job in jobs:
        worker.submit(job)
    go.set()
    for job in jobs:
        with pytest.raises(Unavailable) as caught:
            job.done.result(30)
        assert (caught.value.reason, caught.value.retry_after) == ("WORKER_CRASHED", 2.0)
    assert worker.lost() in caught.value.message
    with pytest.raises(Unavailable, match=worker.lost()):
        worker.submit(ScoreJob(rows=[row(BASE, texts(1)[0])]))
    assert engine.adapters[1].pending == 0


def test_a_stuck_engine_can_be_abandoned_and_what_it_does_later_does_not_count(worker: Worker, engine: Engine) -> None:
    go = block(worker)
    job = ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss())
    worker.submit(job)
    ticket = worker.abandon("a test")
    with pytest.raises(Unavailable, match=ticket):
        job.done.result(0)
    go.set()
    worker._thread.join(30)
    assert not worker._thread.is_alive()
    assert engine.adapters[1].pending == 0


def test_a_thread_that_ends_without_a_word_is_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase.server.config import Limits

    worker = Worker(engine, Limits())
    monkeypatch.setattr(worker, "_thread", threading.Thread(target=lambda: None))
    job = ScoreJob(rows=[row(BASE, texts(1)[0])])
    worker.submit(job)
    assert worker.lost() == ""  # not started yet
    worker.start()
    worker._thread.join()
    assert worker.lost()
    with pytest.raises(Unavailable):
        job.done.result(0)


def test_errors_of_memory_are_told_from_others() -> None:
    class AcceleratorError(RuntimeError):
        pass

    full = [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10,), np.dtype("f4")),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError(FULL),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ]
    poison = [
        RuntimeError("CUDA error: device-side assert triggered"),
        AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ]
    other = [RuntimeError("shapes do not match"), KeyError("out of memory"), OSError(28, "No space left on device")]
    assert [is_out_of_memory(one) for one in (*full, *poison, *other)] == [True] * 8 + [False] * 6
    assert [is_poison(one) for one in (*full, *poison, *other)] == [False] * 8 + [True] * 3 + [False] * 3
