"""RLOO's arithmetic, and the derivatives that it makes itself. Its numbers are held to TRL's in tests/oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from trainer.toy import VOCABULARY, log_softmax, policy_session

from onebase.trainer import RlooConfig, RlooStepper
from onebase.trainer.algorithms.rloo import leave_one_out

REWARDS = arrays(np.float64, (3, 4), elements=st.floats(-100, 100))
QUERIES = [[1], [1], [2], [2]]
RESPONSES = [[3, 0], [4], [3, 3, 0], [1, 0]]


@given(REWARDS)
def test_advantages_of_a_group_sum_to_nothing(rewards):
    np.testing.assert_allclose(leave_one_out(rewards).sum(axis=1), 0, atol=1e-9)


@given(REWARDS, st.floats(-100, 100))
def test_a_completions_baseline_does_not_know_its_own_reward(rewards, other):
    changed = rewards.copy()
    changed[1, 2] = other
    baselines, after = rewards - leave_one_out(rewards), changed - leave_one_out(changed)
    np.testing.assert_allclose(after[1, 2], baselines[1, 2], atol=1e-9)


def test_the_baseline_is_the_mean_of_the_others():
    assert leave_one_out(np.array([[1.0, 2.0, 6.0]])).tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5]]


def test_the_derivatives_are_those_of_the_clipped_loss_of_whole_completions():
    """Against finite differences of the loss, after a first pass has moved the policy and some ratios are clipped."""
    session = policy_session()
    config = RlooConfig(
        batch_size=4,
        mini_batch_size=4,
        num_generations=2,
        num_iterations=2,
        beta=0.0,
        epsilon=0.2,
        learning_rate=0.15,
        max_grad_norm=None,
    )
    scores = [1.0, 0.0, 0.5, 2.0]
    adapter = session.server.adapters["policy_1"]
    start = adapter.weights.copy()
    seen = []
    optim_step = session.optim_step

    def watched(*args, **kwargs):
        seen.append((adapter.weights.copy(), adapter.gradients.copy()))
        return optim_step(*args, **kwargs)

    session.optim_step = watched
    stats = RlooStepper(session, config).step(QUERIES, RESPONSES, scores)
    assert 0 < stats["rloo/policy/clipfrac"] < 0.5  # of the second pass some, of the first none

    advantages = leave_one_out(np.array(scores).reshape(2, 2)).reshape(-1)

    def logprobs(weights):
        table = log_softmax(session.server.reference + weights[:, :VOCABULARY])
        pairs = zip(QUERIES, RESPONSES, strict=True)
        return np.array([sum(table[a, b] for a, b in zip([q[-1], *r[:-1]], r, strict=True)) for q, r in pairs])

    def loss(weights):
        ratios = np.exp(logprobs(weights) - logprobs(start))
        return np.maximum(-advantages * ratios, -advantages * np.clip(ratios, 0.8, 1.2)).mean()

    for weights, gradients in seen:
        expected = np.zeros_like(weights)
        for place in np.ndindex(*weights.shape):
            step = np.zeros_like(weights)
            step[place] = 1e-5
            expected[place] = (loss(weights + step) - loss(weights - step)) / 2e-5
        np.testing.assert_allclose(gradients, expected, atol=2e-6)


def test_the_kl_is_in_the_reward():
    session = policy_session()
    adapter = session.server.adapters["policy_1"]
    adapter.weights = np.random.default_rng(1).normal(size=adapter.weights.shape)
    config = RlooConfig(batch_size=4, mini_batch_size=4, num_generations=2, beta=0.5)
    stats = RlooStepper(session, config).step(QUERIES, RESPONSES, [0.0] * 4)
    kls = stats["objective/kl_dist"]
    np.testing.assert_allclose(stats["rloo/advantages"], -0.5 * leave_one_out(kls.reshape(2, 2)).reshape(-1))
    assert stats["objective/kl_coef"] == 0.5
    assert stats["objective/kl"] == pytest.approx(kls.mean())


def test_the_policy_is_asked_again_only_after_it_has_moved():
    session = policy_session()
    config = RlooConfig(batch_size=4, mini_batch_size=2, num_generations=2, num_iterations=2, learning_rate=0.1)
    RlooStepper(session, config).step(QUERIES, RESPONSES, [1.0, 0.0, 0.5, 2.0])
    kinds = [kind for kind, _ in session.server.calls if kind in ("logprob", "forward_backward", "optim_step")]
    update = ["forward_backward", "optim_step"]
    assert kinds == [*update, *(["logprob", *update] * 3)]


def test_normalized_advantages_have_mean_nothing_and_variance_one():
    session = policy_session()
    config = RlooConfig(batch_size=4, mini_batch_size=4, num_generations=2, normalize_advantages=True)
    stats = RlooStepper(session, config).step(QUERIES, RESPONSES, [1.0, 0.0, 0.5, 2.0])
    assert stats["rloo/advantages"].mean() == pytest.approx(0, abs=1e-12)
    assert stats["rloo/advantages"].std(ddof=1) == pytest.approx(1, abs=1e-3)
