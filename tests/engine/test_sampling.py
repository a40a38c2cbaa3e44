"""Draws: the filters keep what transformers' keep, and the right distribution comes out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onebase.server.engine.sampling import draw, keep_probable, uniform
from onebase.server.jobs import Sampling

VOCABULARY = 50


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.3, 2.0),
    top_k=st.integers(0, 60),
    # in hundredths: at a bound that a sum of probabilities meets to the last bit, both are right
    top_p=st.integers(5, 100).map(lambda hundredths: hundredths / 100),
    min_p=st.integers(0, 90).map(lambda hundredths: hundredths / 100),
)
def test_filters_keep_the_tokens_that_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    wanted = torch.isfinite(warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone()))[0]
    found = torch.softmax(logits[0] / temperature, -1)
    keep_probable(found, Sampling(8, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert (found > 0).tolist() == wanted.tolist()


@given(seed=st.integers(0, 1000), batch=st.integers(1, 5), temperature=st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_a_draw_depends_on_its_own_row_alone(seed: int, batch: int, temperature: float) -> None:
    logits = torch.randn(batch, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    sampling = [Sampling(8, temperature=temperature if i % 2 else 1.0, seed=seed) for i in range(batch)]
    places = [(i, 0, 3) for i in range(batch)]
    together = draw(logits, sampling, places)
    assert together == [draw(logits[i : i + 1], sampling[i : i + 1], places[i : i + 1])[0] for i in range(batch)]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 4000
    logits = torch.log(probabilities).expand(count, -1)
    drawn = draw(logits, [Sampling(8, seed=1)] * count, [(0, 0, position) for position in range(count)])
    frequency = np.bincount(drawn, minlength=4) / count
    np.testing.assert_allclose(frequency, probabilities.numpy(), atol=0.025)


@given(seed=st.integers(0, 500))
def test_a_banned_token_is_never_drawn(seed: int) -> None:
    logits = torch.zeros(1, 8)
    logits[0, [0, 3, 7]] = -torch.inf
    assert draw(logits, [Sampling(8, seed=seed)], [(0, 0, 0)])[0] not in (0, 3, 7)


@given(
    one=st.tuples(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10_000)),
    other=st.tuples(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 10_000)),
)
def test_every_place_has_a_number_of_its_own(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
    assert 0.0 <= uniform(*one) < 1.0
    assert (uniform(*one) == uniform(*other)) == (one == other)
