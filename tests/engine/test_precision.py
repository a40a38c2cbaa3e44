"""Half-precision bases on CPUs without half-precision products: weights stay narrow, products are wide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.conftest import BASE, perturb, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, open_engine, precision
from onebase.server.engine.batch import Row
from onebase.server.engine.engine import Decoding, Draw, Scoring
from onebase.server.jobs import CreateAdapterJob, LoraSpec, Sampling, ScoreRow


@pytest.fixture(params=["bfloat16", "float16"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine that widens: it is exact."""
    engine = open_engine(EngineConfig(model=str(BASE), dtype=request.param, threads=1, kv_slots=4))
    spec = LoraSpec(rank=4, alpha=8.0)
    engine.add(engine.formats.create(CreateAdapterJob(uid=1, name="one", lora=spec, value_head=True, seed=1)))
    perturb(engine, 1)
    return engine


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_products_and_gradients_are_those_of_the_widened_weight(rows: int, size: int, out: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=random).bfloat16()
    x = torch.randn(1, rows, size, generator=random, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "BLOCK", 128 * 16)  # several blocks either way
        y = precision.wide_linear(x, weight)
        [gradient] = torch.autograd.grad(y.square().sum(), x)
    truth = x @ weight.float().T
    expected = torch.autograd.grad(truth.square().sum(), x)[0]
    assert (y - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert y.dtype == gradient.dtype == torch.float32


def test_weights_stay_narrow_and_numbers_err_no_more_than_narrow_products(engine: Engine) -> None:
    narrow = AutoModelForCausalLM.from_pretrained(BASE, dtype=getattr(torch, engine.facts.dtype)).eval()
    tokens = list(range(3, 40))
    assert engine.facts.weights_bytes == sum(p.numel() * p.element_size() for p in narrow.parameters())
    with torch.no_grad():
        ours = engine.forward([Row(None, tokens)])[1][: len(tokens)].float()
        theirs = narrow.base_model(torch.tensor([tokens])).last_hidden_state[0].float()
        truth = narrow.float().base_model(torch.tensor([tokens])).last_hidden_state[0]
    assert (ours - truth).abs().mean() < 1.1 * (theirs - truth).abs().mean()


def test_generated_logprobs_equal_the_scored_ones(engine: Engine) -> None:
    assert engine.facts.exact
    weights, sampling = engine.adapter(1).weights, Sampling(max_new_tokens=30, seed=3)
    prompt, slot, tokens, logprobs = [5, 6, 7], engine.kv.take(), [], []
    for at in range(30):
        row = Row(weights, tokens[-1:], 2 + at, slot) if at else Row(weights, prompt, 0, slot)
        _, [[drawn]] = engine.step([], [Decoding(row, (Draw(sampling, (0, 0, at)),))])
        tokens.append(drawn.token)
        logprobs.append(drawn.logprob)
    want = ScoreRow(1, np.array(prompt + tokens), len(prompt), logprobs=True)
    [scored], _ = engine.step([Scoring(want, weights)], [])
    np.testing.assert_array_equal(np.float32(logprobs), scored.logprobs)


def test_a_rows_numbers_do_not_depend_on_its_batch(engine: Engine) -> None:
    spec = LoraSpec(rank=4, alpha=8.0)
    for uid in (2, 3):
        engine.add(
            engine.formats.create(CreateAdapterJob(uid=uid, name=str(uid), lora=spec, value_head=True, seed=uid))
        )
        perturb(engine, uid)
    wants = [
        Scoring(ScoreRow(1 + i % 3, tokens, 3, logprobs=True), engine.adapter(1 + i % 3).weights)
        for i, tokens in enumerate(texts(8))
    ]
    mixed, _ = engine.step(wants, [])
    for want, found in zip(wants, mixed, strict=True):
        [alone], _ = engine.step([want], [])
        np.testing.assert_array_equal(found.logprobs, alone.logprobs)


def test_float32_and_other_devices_need_none() -> None:
    assert not precision.widens(torch.float32, torch.device("cpu"), exact=True)
    assert not precision.widens(torch.bfloat16, torch.device("cuda"), exact=True)


@pytest.mark.parametrize("multiplies", [False, True])
def test_exact_numbers_need_it_also_where_the_cpu_multiplies_half_precision(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool
) -> None:
    """There torch takes another way for small products, so that a row's numbers would depend on its batch."""
    for name in precision.HALF.values():
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: multiplies, raising=False)
    for dtype in precision.HALF:
        assert precision.widens(dtype, torch.device("cpu"), exact=True)
        assert precision.widens(dtype, torch.device("cpu"), exact=False) == (not multiplies)
