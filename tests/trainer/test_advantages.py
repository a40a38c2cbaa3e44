"""PPO's arithmetic, against the definitions written out token by token."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onebase.trainer.advantages import (
    advantages_and_returns,
    kl_penalty,
    masked_mean,
    masked_variance,
    pad,
    token_rewards,
    whiten,
)

numbers = st.floats(-5, 5, width=32)


@st.composite
def batches(draw):
    """(values, rewards, mask) of ragged rows, padded with numbers that must not matter."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    shape = (len(lengths), max(lengths))
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    return draw(arrays(np.float64, shape, elements=numbers)), draw(arrays(np.float64, shape, elements=numbers)), mask


def gae_by_definition(values, rewards, gamma, lam):
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}, with no value after the end."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(values))
    ]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(values))]


@given(batches(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_advantages_are_the_discounted_sums_of_the_temporal_differences(batch, gamma, lam):
    values, rewards, mask = batch
    found = advantages_and_returns(values, rewards, mask, gamma=gamma, lam=lam)
    expected = [
        gae_by_definition(values[row][mask[row]], rewards[row][mask[row]], gamma, lam) for row in range(len(mask))
    ]
    flat = np.array([advantage for row in expected for advantage in row])
    np.testing.assert_allclose(found.returns[mask], flat + values[mask], rtol=1e-9, atol=1e-9)
    variance = flat.var(ddof=1) if flat.size > 1 else 0.0
    np.testing.assert_allclose(
        found.advantages[mask], (flat - flat.mean()) / math.sqrt(variance + 1e-8), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_what_is_padded_changes_nothing(whiten_rewards):
    mask = np.array([[True, True, False], [True, True, True]])
    values, rewards = np.arange(6.0).reshape(2, 3), np.array([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]])
    settings = {"gamma": 0.9, "lam": 0.8, "whiten_rewards": whiten_rewards}
    narrow = advantages_and_returns(values, rewards, mask, **settings)
    wider = [
        np.pad(np.where(mask, numbers, 99.0), ((0, 0), (0, 2)), constant_values=-7.0) for numbers in (values, rewards)
    ]
    wide_mask = np.pad(mask, ((0, 0), (0, 2)))
    wide = advantages_and_returns(*wider, wide_mask, **settings)
    np.testing.assert_allclose(wide.advantages[wide_mask], narrow.advantages[mask], rtol=1e-12)
    np.testing.assert_allclose(wide.returns[wide_mask], narrow.returns[mask], rtol=1e-12)


def test_one_token_in_the_whole_batch_has_advantage_zero_and_no_nan():
    found = advantages_and_returns(np.array([[0.5]]), np.array([[2.0]]), np.array([[True]]), gamma=1.0, lam=0.95)
    assert found.advantages.tolist() == [[0.0]]
    assert found.returns.tolist() == [[2.0]]


@given(batches())
@settings(deadline=None)
def test_whitening_gives_mean_zero_and_unbiased_variance_one_over_the_tokens_that_count(batch):
    values, _, mask = batch
    whitened = whiten(values, mask)
    assert masked_mean(whitened, mask) == pytest.approx(0, abs=1e-6)
    variance = masked_variance(values, mask)
    assert masked_variance(whitened, mask) == pytest.approx(variance / (variance + 1e-8), abs=1e-6)
    np.testing.assert_allclose(whiten(values, mask, shift_mean=False), whitened + masked_mean(values, mask))


def test_variance_has_bessels_correction():
    assert masked_variance(np.array([[1.0, 3.0, 100.0]]), np.array([[True, True, False]])) == 2.0


def test_the_score_stands_at_the_last_token_that_counts():
    logprobs, reference = np.full((3, 3), -1.0), np.full((3, 3), -1.5)
    mask = np.array([[True, True, True], [True, False, False], [True, True, False]])
    found = token_rewards(np.array([10.0, 20.0, 30.0]), logprobs, reference, mask, kl_coef=0.2)
    np.testing.assert_allclose(found.kls, 0.5)
    np.testing.assert_allclose(found.non_score, -0.1)
    np.testing.assert_allclose(
        found.rewards, [[-0.1, -0.1, 9.9], [19.9, -0.1, -0.1], [-0.1, 29.9, -0.1]], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("kind", "expected"), [("kl", [-2.0, 3.0]), ("abs", [2.0, 3.0]), ("mse", [2.0, 4.5])])
def test_the_kinds_of_kl_penalty(kind, expected):
    assert kl_penalty(np.array([-3.0, -1.0]), np.array([-1.0, -4.0]), kind).tolist() == expected


def test_an_unknown_kl_penalty_is_refused_by_name():
    with pytest.raises(ValueError, match="'full' is not one of kl, abs, mse"):
        kl_penalty(np.zeros(1), np.zeros(1), "full")


def test_rows_are_padded_on_the_right_with_zeros():
    assert pad([[1.0], np.array([2.0, 3.0], dtype=np.float32)], 3).tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]
