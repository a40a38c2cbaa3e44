"""The engine on the kernels, under Triton's interpreter. Run by test_segmented_lora in a process of its own.

Two engines on the same base with the same adapters take the same steps: one on the kernels, one on torch's products.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine.conftest import BASE, generation, perturb, texts
from engine.test_mixed import train_rows

from onebase.server.config import EngineConfig, Limits
from onebase.server.engine import Engine, loading, open_engine, training
from onebase.server.engine.adapters import Weights
from onebase.server.engine.batch import Row
from onebase.server.engine.engine import Decoding, Draw, Scoring
from onebase.server.engine.kernels import KernelFailure, segmented_lora, try_out
from onebase.server.jobs import AdamW, CreateAdapterJob, ForwardBackwardJob, LoraSpec, PpoLoss, Sampling, ScoreRow
from onebase.server.worker import Worker

CPU = torch.device("cpu")


def spec(rank: int, *layers: str, **more: Any) -> LoraSpec:
    """A policy of few layers: the interpreter is slow."""
    return LoraSpec(rank=rank, alpha=8.0, target_modules=layers, **more)


POLICIES = {
    1: spec(3, "q_proj", "down_proj"),
    2: spec(16, "q_proj"),
    3: spec(40, "v_proj", "down_proj", rank_pattern={"down_proj": 5}),
}
CLOSE = {"float32": 1e-5, "bfloat16": 6e-2}
"""Largest difference of hidden states, relative to the largest of them."""


@dataclass
class Pair:
    """The two engines, and how often the kernels were launched."""

    kernels: Engine
    torch: Engine
    dtype: str
    launches: list[int]

    @property
    def both(self) -> tuple[Engine, Engine]:
        return self.kernels, self.torch

    def add(self, uid: int, lora: LoraSpec) -> None:
        for engine in self.both:
            job = CreateAdapterJob(uid=uid, name=f"policy_{uid}", lora=lora, value_head=True, seed=uid)
            engine.add(engine.formats.create(job))
            perturb(engine, uid)

    def on_kernels(self, run: Callable[[Engine], Any]) -> tuple[Any, Any]:
        """What it gives on each engine; it must launch kernels on the one and none on the other."""
        before = len(self.launches)
        first = run(self.kernels)
        between = len(self.launches)
        second = run(self.torch)
        assert before < between == len(self.launches)
        return first, second

    def hidden(self, rows: Callable[[Engine], Sequence[Row]]) -> torch.Tensor:
        """The hidden states of a step on the kernels, which are checked against torch's: tokens [n, hidden]."""

        @torch.no_grad()
        def run(engine: Engine) -> torch.Tensor:
            step = rows(engine)
            _, hidden = engine.forward(step)
            return torch.cat([hidden[row.start : row.stop] for row in step]).float()

        ours, theirs = self.on_kernels(run)
        assert (ours - theirs).abs().max() < CLOSE[self.dtype] * theirs.abs().max()
        return ours


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each update that the kernels made, since the test began."""
    seen: list[int] = []
    kernel = segmented_lora.add_lora_

    def add_lora_(*arguments: Any) -> None:
        seen.append(len(seen))
        kernel(*arguments)

    monkeypatch.setattr(segmented_lora, "add_lora_", add_lora_)
    return seen


@pytest.fixture(params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Two engines with POLICIES. In bfloat16 products are not widened, so that adapters have their rounded copies."""
    monkeypatch.setattr(loading, "widens", lambda dtype, device, exact: False)
    dtype, _, quantization = request.param.partition(" ")

    def opened(kernels: str) -> Engine:
        config = EngineConfig(
            str(BASE), threads=1, dtype=dtype, quantization=quantization or "none", kernels=kernels, exact="off"
        )
        return open_engine(config)

    pair = Pair(opened("on"), opened("off"), dtype, launches)
    for uid, lora in POLICIES.items():
        pair.add(uid, lora)
    launches.clear()  # of the trial when the engine was opened
    return pair


@pytest.fixture
def fp32(launches: list[int]) -> Pair:
    """Two engines in float32 without adapters."""
    engines = [open_engine(EngineConfig(model=str(BASE), threads=1, kernels=k, exact="off")) for k in ("on", "off")]
    launches.clear()
    return Pair(*engines, "float32", launches)


def weights(engine: Engine, uid: int) -> Weights | None:
    return engine.adapters[uid].weights if uid else None


def trained(engine: Engine, uid: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One pass; its gradients."""
    task = engine.begin_pass(ForwardBackwardJob(adapter=uid, rows=train_rows(seed), loss=PpoLoss()))
    training.run(engine, [(task, len(task.job.rows))])
    training.finish(task)
    return task.gradients


@pytest.mark.parametrize("pair", ["float32", "bfloat16", "float32 int8"], indirect=True)
def test_a_mixed_step_is_what_torch_makes_of_it(pair: Pair) -> None:
    random = [t.tolist() for t in texts(6, shortest=18)]
    owners = (1, 2, 3, 0)

    def prefill(engine: Engine) -> list[Row]:
        return [Row(weights(engine, uid), random[i][:12], slot=i) for i, uid in enumerate(owners)]

    def mixed(engine: Engine) -> list[Row]:
        decoding = [Row(weights(engine, uid), [7 + i], past=12, slot=i) for i, uid in enumerate(owners[:3])]
        chunk = Row(None, random[3][12:18], past=12, slot=3)
        scored = [Row(weights(engine, uid), random[i]) for uid, i in ((3, 4), (0, 5), (1, 5))]
        return [*decoding, chunk, *scored]

    pair.hidden(prefill)
    pair.hidden(mixed)
    pair.hidden(lambda engine: [Row(weights(engine, 2), [5], past=13, slot=1)])
    alone = pair.hidden(lambda engine: [Row(weights(engine, 3), random[5])])
    base = pair.torch.forward([Row(None, random[5])])[1][: len(alone)].float()
    assert (alone - base).abs().max() > 0.1 * base.abs().max()


def test_conv1d_layers(launches: list[int]) -> None:
    """GPT-2 keeps its weights the other way round; adapters' A and B are as anywhere."""
    base = str(BASE.parent / "base_gpt2")
    engines = [open_engine(EngineConfig(base, threads=1, kernels=k, exact="off")) for k in ("on", "off")]
    pair = Pair(*engines, "float32", launches)
    pair.add(1, spec(5, "c_attn", "mlp.c_proj"))
    pair.hidden(lambda engine: [Row(weights(engine, 1), [4, 5, 6]), Row(None, [7, 8])])


def test_rows_without_adapters_need_no_kernel(fp32: Pair) -> None:
    with torch.no_grad():
        ours, theirs = (engine.forward([Row(None, [5, 6, 7])])[1] for engine in fp32.both)
    assert ours.equal(theirs)
    assert not fp32.launches


def test_scores_and_draws(pair: Pair) -> None:
    sequences = texts(3)

    def step(engine: Engine) -> Any:
        scorings = [
            Scoring(ScoreRow(uid, t, 3, logprobs=True, entropy=True, values=True), weights(engine, uid))
            for uid, t in zip(POLICIES, sequences, strict=True)
        ]
        draw = Draw(Sampling(max_new_tokens=1, temperature=0.0), (0, 0, 0))
        decodings = [Decoding(Row(weights(engine, uid), [4, 5, 6]), (draw,), value=True) for uid in POLICIES]
        return engine.step(scorings, decodings)

    (ours, drawn), (theirs, expected) = pair.on_kernels(step)
    close = {"rtol": 0, "atol": 5 * CLOSE[pair.dtype]}
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, **close)
        np.testing.assert_allclose(one.entropy, other.entropy, **close)
        np.testing.assert_allclose(one.values, other.values, **close)
    for [one], [other] in zip(drawn, expected, strict=True):
        assert (one.logprob, one.value) == pytest.approx((other.logprob, other.value), abs=close["atol"])


def test_training_takes_torch_and_gives_its_gradients_bit_for_bit(pair: Pair) -> None:
    ours, theirs = ([trained(engine, uid, seed=uid) for uid in POLICIES] for engine in pair.both)
    assert not pair.launches
    for one, other in zip(ours, theirs, strict=True):
        assert any(gradient.any() for gradient in one.values())
        for name, gradient in one.items():
            assert gradient.equal(other[name]), name


def test_a_step_in_place_is_seen(pair: Pair) -> None:
    def rows(engine: Engine) -> list[Row]:
        return [Row(weights(engine, uid), [4, 5, 6, 7]) for uid in POLICIES]

    before = pair.hidden(rows)
    for engine in pair.both:
        held = weights(engine, 1)
        trained(engine, 1)
        engine.adapters[1].step(AdamW(0.1), 0.0)
        assert weights(engine, 1) is held
    after = pair.hidden(rows)
    assert (after[:4] - before[:4]).abs().max() > 0.1
    assert after[4:].equal(before[4:])


def test_a_version_that_is_read_stays_beside_the_next(pair: Pair) -> None:
    old = {engine: engine.bind(1) for engine in pair.both}

    def rows(engine: Engine) -> list[Row]:
        return [Row(old[engine], [4, 5, 6, 7]), Row(weights(engine, 1), [4, 5, 6, 7])]

    before = pair.hidden(lambda engine: [rows(engine)[0]])
    for engine in pair.both:
        trained(engine, 1)
        engine.adapters[1].step(AdamW(0.1), 0.0)
        assert weights(engine, 1) is not old[engine]
    after = pair.hidden(rows)
    assert after[:4].equal(before)
    assert (after[4:] - before).abs().max() > 0.1


def test_adapters_that_come_and_go_leave_nothing_behind(fp32: Pair) -> None:
    """Memory of a deleted adapter is given to the next one; what was noted of the old must not be read for it."""
    for seed in range(3):
        fp32.add(1, spec(4 + seed, "q_proj"))
        fp32.hidden(lambda engine: [Row(weights(engine, 1), [4, 5, 6, 7])])
        version = fp32.kernels.adapters[1].weights
        gone = [weakref.ref(tensor) for one in version.lora.values() for tensor in (one.a, one.compute_b)]
        del version
        for engine in fp32.both:
            engine.delete(1)
            engine.rest()
        gc.collect()
        assert not any(ref() is not None for ref in gone)


def test_addresses_are_noted_once_per_version(fp32: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase.server.engine import segmented

    made: list[Any] = []
    entries = segmented.AdapterEntries

    def noted(*arguments: Any) -> Any:
        made.append(arguments)
        return entries(*arguments)

    monkeypatch.setattr(segmented, "AdapterEntries", noted)
    for uid in (1, 2):
        fp32.add(uid, spec(4, "q_proj"))
    engine = fp32.kernels
    with torch.no_grad():
        for uids in ((1,), (1, 2), (2,), (1, 2), (1, 2)):
            engine.forward([Row(weights(engine, uid), [4, 5, 6]) for uid in uids])
    assert len(made) == 2


def test_completions_on_a_worker(fp32: Pair) -> None:
    fp32.add(1, spec(4, "q_proj"))
    fp32.add(2, spec(9, "q_proj", "up_proj"))
    prompts = [t[:5] for t in texts(2)]

    def complete(engine: Engine) -> list[Any]:
        worker = Worker(engine, Limits())
        worker.start()
        jobs = [generation(uid, prompts, temperature=0.0, max_new_tokens=6, ignore_eos=True) for uid in (1, 2)]
        for job, _ in jobs:
            worker.submit(job)
        for job, _ in jobs:
            job.done.result(60)
        worker.stop(0.0)
        return [chunk for _, chunks in jobs for [chunk] in chunks.values()]

    for one, other in zip(*fp32.on_kernels(complete), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_trial_passes(dtype: torch.dtype) -> None:
    try_out(CPU, dtype)


def test_a_trial_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelFailure, match=r"no kernels for torch\.float64"):
        try_out(CPU, torch.float64)
    monkeypatch.setattr(segmented_lora, "add_lora_", lambda x, y, table, tiles: y.add_(1e-4))
    with pytest.raises(KernelFailure, match="differ from torch's by"):
        try_out(CPU, torch.float32)

    def fail(*arguments: Any) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(segmented_lora, "add_lora_", fail)
    with pytest.raises(KernelFailure, match="OSError: no C compiler"):
        try_out(CPU, torch.float32)
