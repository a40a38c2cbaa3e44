"""GRPO's arithmetic, and what it asks of the server. Its numbers are held to TRL's in tests/oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from trainer.toy import policy_session

from onebase.client import types as t
from onebase.trainer import GrpoConfig, GrpoStepper
from onebase.trainer.algorithms.grpo import EPSILON, group_advantages

SCORES = arrays(np.float64, (3, 4), elements=st.floats(-100, 100))
QUERIES = [[1], [1], [2], [2]]
RESPONSES = [[3, 0], [4], [3, 3, 0], [1, 0]]


@given(SCORES)
def test_advantages_of_a_group_sum_to_nothing_and_keep_its_order(scores):
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(scores, scale)
        np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-6)
        for group, found in zip(scores, advantages, strict=True):
            assert (np.diff(found[np.argsort(group)]) >= -1e-9).all()


@given(SCORES, st.floats(-50, 50))
def test_advantages_do_not_depend_on_where_zero_is(scores, shift):
    np.testing.assert_allclose(
        group_advantages(scores + shift, "group"), group_advantages(scores, "group"), rtol=1e-6, atol=1e-6
    )


def test_advantages_are_measured_in_deviations_of_the_group_or_of_the_batch():
    scores = np.array([[0.0, 2.0], [10.0, 30.0]])
    group = group_advantages(scores, "group")
    np.testing.assert_allclose(group, [[-1, 1] / (np.sqrt(2) + EPSILON), [-10, 10] / (np.sqrt(200) + EPSILON)])
    np.testing.assert_allclose(group_advantages(scores, "none"), [[-1, 1], [-10, 10]])
    np.testing.assert_allclose(
        group_advantages(scores, "batch"), np.array([[-1, 1], [-10, 10]]) / (scores.std(ddof=1) + EPSILON)
    )


def test_a_group_that_agrees_teaches_nothing():
    session = policy_session()
    config = GrpoConfig(batch_size=4, mini_batch_size=4, num_generations=2, learning_rate=0.1)
    stats = GrpoStepper(session, config, max_new_tokens=3).step(QUERIES, RESPONSES, [1.0, 1.0, -2.0, -2.0])
    assert stats["grpo/frac_reward_zero_std"] == 1.0
    assert not session.server.adapters["policy_1"].weights.any()


@pytest.mark.parametrize(
    ("loss_type", "denominators"),
    [("grpo", [2, 2]), ("bnpo", [4, 4]), ("dapo", [4, 4]), ("dr_grpo", [6, 6])],
)
def test_each_loss_divides_by_what_it_is_named_for(loss_type, denominators):
    session = policy_session()
    config = GrpoConfig(batch_size=4, mini_batch_size=2, num_generations=2, loss_type=loss_type)
    stepper = GrpoStepper(session, config, max_new_tokens=3, rng=InOrder())
    stepper.step([[1], [1], [2], [2]], [[3, 0], [4, 0], [3, 0], [1, 0]], [1.0, 0.0, 2.0, 0.0])
    passes = [call for kind, call in session.server.calls if kind == "forward_backward"]
    assert [call["denominator"] for call in passes] == denominators
    weights = passes[0]["sequences"][0].weights
    assert (weights is None) == (loss_type != "grpo")


class InOrder:
    def permutation(self, count):
        return np.arange(count)


def test_uneven_lengths_weigh_as_the_loss_says():
    """The same advantages on a short and a long completion: "grpo" gives them the same weight, "bnpo" by tokens."""
    found = {}
    for loss_type in ("grpo", "bnpo", "dapo", "dr_grpo"):
        session = policy_session()
        config = GrpoConfig(
            batch_size=2, mini_batch_size=2, num_generations=2, loss_type=loss_type, scale_rewards="none"
        )
        stats = GrpoStepper(session, config, max_new_tokens=10).step([[1], [1]], [[3], [4, 4, 4, 0]], [1.0, -1.0])
        found[loss_type] = stats["grpo/loss/total"]
    assert found == {
        "grpo": pytest.approx(0.0, abs=1e-6),  # -(1) + (1)
        "bnpo": pytest.approx(3 / 5),  # of five tokens one is -1 and four are +1
        "dapo": pytest.approx(3 / 5),
        "dr_grpo": pytest.approx(3 / 20),
    }


def test_the_reference_is_asked_for_only_where_it_is_used():
    asked = {}
    for beta in (0.0, 0.1):
        session = policy_session()
        config = GrpoConfig(batch_size=4, mini_batch_size=4, num_generations=2, beta=beta)
        stats = GrpoStepper(session, config, max_new_tokens=3).step(QUERIES, RESPONSES, [1.0, 0.0, 2.0, 0.0])
        (call,) = (call for kind, call in session.server.calls if kind == "score")
        (passed,) = (call for kind, call in session.server.calls if kind == "forward_backward")
        assert passed["loss"].kl_coef == beta
        assert passed["loss"].vf_coef == 0.0
        asked[beta] = call["outputs"], "objective/kl" in stats
    assert asked == {0.0: (("logprobs",), False), 0.1: (("logprobs", "reference_logprobs"), True)}


def test_the_clip_reaches_the_server():
    session = policy_session()
    config = GrpoConfig(batch_size=4, mini_batch_size=4, num_generations=2, epsilon=0.1, epsilon_high=0.3)
    GrpoStepper(session, config, max_new_tokens=3).step(QUERIES, RESPONSES, [1.0, 0.0, 2.0, 0.0])
    (passed,) = (call for kind, call in session.server.calls if kind == "forward_backward")
    assert (passed["loss"].cliprange, passed["loss"].cliprange_high) == (0.1, 0.3)
    assert isinstance(passed["loss"], t.PpoLoss)
