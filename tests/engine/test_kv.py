"""The cache: a budget that is kept, completions that give way and come back, prompts in parts, shared beginnings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine.conftest import BASE, POLICIES, generation, perturb, texts
from hypothesis import given
from hypothesis import strategies as st

from onebase.server.config import Budget, EngineConfig, Limits
from onebase.server.engine import Engine, open_engine
from onebase.server.engine.kv import KVCache
from onebase.server.errors import ResourceExhausted
from onebase.server.jobs import AdamW, CreateAdapterJob, ForwardBackwardJob, Job, LoraSpec, OptimStepJob, PpoLoss
from onebase.server.worker import Worker

Make = Callable[..., tuple[Engine, Worker, Callable[[Job[Any]], Any]]]
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # two layers, keys and values, two heads of eight floats


@pytest.fixture
def make() -> Iterator[Make]:
    """A worker with POLICIES on an engine with a cache of so many bytes and steps of so many tokens."""
    workers = []

    def make(kv_bytes: int = 0, step_tokens: int = 256, slots: int = 8) -> tuple[Engine, Worker, Any]:
        engine = open_engine(EngineConfig(model=str(BASE), threads=1, kv_slots=slots, kv_bytes=kv_bytes))
        worker = Worker(engine, Limits(), Budget(step_tokens, step_tokens))
        worker.start()
        workers.append(worker)

        def run(job: Job[Any]) -> Any:
            worker.submit(job)
            return job.done.result(60)

        for uid in POLICIES:
            run(CreateAdapterJob(uid=uid, name=str(uid), lora=LoraSpec(rank=2 * uid), value_head=True, seed=uid))
            perturb(engine, uid)
        return engine, worker, run

    yield make
    for worker in workers:
        worker.stop(0.0)


def ask(uid: int, seed: int = 3, **more: Any) -> Any:
    return generation(uid, [t[:9] for t in texts(4, seed)], n=3, seed=seed, max_new_tokens=70, ignore_eos=True, **more)


def outcome(chunks: dict[tuple[int, int], list[Any]]) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    return {
        key: ([t for p in parts for t in p.tokens], [x for p in parts for x in p.logprobs])
        for key, parts in chunks.items()
    }


def test_completions_that_gave_way_end_as_if_they_had_not(make: Make) -> None:
    _, _, run = make()
    job, wanted = ask(1)
    run(job)
    budget = 200 * TOKEN_BYTES
    engine, worker, _ = make(kv_bytes=budget)
    preempted = []
    for uid in POLICIES:  # three tenants crowd a cache that holds two or three completions
        job, found = ask(uid)
        worker.submit(job)
        preempted.append((job, found))
    most = 0
    for job, _ in preempted:
        while not job.done.done():
            most = max(most, engine.kv.bytes)
            time.sleep(0.002)
        job.done.result(0)
    assert 0 < most <= budget
    assert outcome(preempted[0][1]) == outcome(wanted)
    assert engine.kv.used == 0


def test_a_completion_that_could_never_fit_is_refused(make: Make) -> None:
    _, _, run = make(kv_bytes=64 * TOKEN_BYTES)
    job, _ = ask(1)
    with pytest.raises(ResourceExhausted, match=r"79 tokens.*--kv-bytes"):
        run(job)


def test_a_completion_that_just_fits_does_not_wait_for_room_that_it_will_not_need(make: Make) -> None:
    _, _, run = make(kv_bytes=64 * TOKEN_BYTES)
    job, chunks = generation(1, texts(1, shortest=50, longest=51), max_new_tokens=10, ignore_eos=True)
    run(job)
    assert len(outcome(chunks)[0, 0][0]) == 10


def test_a_long_prompt_begins_while_short_ones_keep_coming(make: Make) -> None:
    _, worker, _ = make(kv_bytes=256 * TOKEN_BYTES, slots=4)
    crowd = []
    for length in (20, 27, 33, 40):  # so that they never end together
        job, _ = generation(1, texts(40, shortest=6, longest=9), max_new_tokens=length, ignore_eos=True)
        job.session = f"crowd {length}"
        crowd.append(job)
        worker.submit(job)
    long, _ = generation(2, texts(1, shortest=100, longest=101), max_new_tokens=10, ignore_eos=True)
    long.session = "long"
    worker.submit(long)
    long.done.result(60)
    assert not any(job.done.done() for job in crowd)


def test_a_prompt_in_parts_is_the_prompt_at_once(make: Make) -> None:
    prompts = texts(3, shortest=60, longest=90)
    found = []
    for step_tokens in (16, 256):
        _, _, run = make(step_tokens=step_tokens)
        job, chunks = generation(2, prompts, n=2, seed=1, max_new_tokens=8, ignore_eos=True)
        run(job)
        found.append(outcome(chunks))
    assert found[0] == found[1]


def test_a_shared_beginning_is_copied_and_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    start = texts(1, shortest=50, longest=51)[0]
    first, second = (np.append(start, tail) for tail in ([7, 8, 9], [10, 11]))
    _, _, run = make()
    job, alone = generation(1, [second], seed=1, max_new_tokens=8)
    run(job)
    engine, _, run = make()
    job, _ = generation(1, [first], seed=2, max_new_tokens=8)
    run(job)
    widths: list[int] = []
    forward = engine.forward
    monkeypatch.setattr(
        engine, "forward", lambda rows: (widths.append(sum(len(r.tokens) for r in rows)), forward(rows))[1]
    )
    job, found = generation(1, [second], seed=1, max_new_tokens=8)
    run(job)
    assert widths[0] == 2, "the fifty shared tokens were run again"
    assert outcome(found) == outcome(alone)
    widths.clear()
    job, _ = generation(2, [second], seed=1, max_new_tokens=1)
    run(job)
    assert widths[0] == 52, "another policy's numbers were taken"


def test_a_new_version_shares_nothing_with_the_old_one(make: Make) -> None:
    from engine.test_mixed import train_rows

    prompt = texts(1, shortest=50, longest=51)
    engine, _, run = make()
    job, before = generation(1, prompt, seed=1, max_new_tokens=8)
    run(job)
    run(ForwardBackwardJob(adapter=1, rows=train_rows(1), loss=PpoLoss()))
    run(OptimStepJob(adapter=1, adamw=AdamW(0.3)))
    assert engine.kv.shared((engine.adapters[1].weights.serial, 1), prompt[0].tolist()) == (-1, 0)
    job, after = generation(1, prompt, seed=1, max_new_tokens=8)
    run(job)
    assert outcome(after) != outcome(before)


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "write", "give"]), st.integers(0, 7), st.integers(1, 128)), max_size=40
    ),
    st.integers(2, 40),
)
def test_the_budget_is_kept_whatever_comes(events: list[tuple[str, int, int]], blocks: int) -> None:
    token_bytes = 2 * 3 * 4 * 4
    kv = KVCache(8, 128, blocks * 16 * token_bytes, token_bytes)
    lengths: dict[int, int] = {}
    for kind, which, length in events:
        if kind == "take" and kv.free(length):
            lengths[kv.take()] = length
        elif kind == "give" and lengths:
            slot = sorted(lengths)[which % len(lengths)]
            kv.give_back(slot, "key", list(range(lengths.pop(slot))))
        elif kind == "write" and lengths:
            slot = sorted(lengths)[which % len(lengths)]
            if kv.fits(max(length, *lengths.values())):
                lengths[slot] = max(length, lengths[slot])
                kv.write(0, slot, 0, torch.ones(3, length, 4), torch.ones(3, length, 4))
        assert kv.bytes <= blocks * 16 * token_bytes
        assert kv.used == len(lengths)


def test_short_prompts_begin_together_and_those_that_begin_alike_after_the_first(make: Make) -> None:
    prompts = texts(4, shortest=20, longest=30)
    alike = [np.concatenate([prompts[0], one]) for one in texts(3, seed=9)]
    for some, steps in ((prompts, 1), (alike, 2)):
        engine, _, run = make(step_tokens=512)
        begun: list[int] = []
        step = engine.step

        def seen(scorings: Any, decodings: Any, step: Any = step, begun: list[int] = begun) -> Any:
            begun.append(sum(len(d.row.tokens) > 1 or d.row.past == 0 for d in decodings))
            return step(scorings, decodings)

        engine.step = seen  # type: ignore[method-assign]
        job, chunks = generation(1, some, n=2, max_new_tokens=8, ignore_eos=True)
        run(job)
        assert sum(begun[:steps]) == sum(begun) == len(some)
        assert {len(tokens) for tokens, _ in outcome(chunks).values()} == {8}
