"""Statistics where the recorded steps of TRL do not reach."""

import math

import numpy as np

from onebase.trainer.stats import length_stats, reward_stats, scalars, standard_deviation, training_stats


def test_returns_that_are_all_equal_leave_nothing_to_explain():
    mask = np.array([[True]])
    one = {"val/error": 1.0, "returns/var": 0.0}
    assert training_stats([one], np.zeros((1, 1)), mask)["ppo/val/var_explained"] == -math.inf
    none = {"val/error": 0.0, "returns/var": 0.0}
    assert math.isnan(training_stats([none], np.zeros((1, 1)), mask)["ppo/val/var_explained"])


def test_metrics_are_averaged_over_all_passes_and_variance_explained_over_the_averages():
    passes = [{"val/error": 1.0, "returns/var": 4.0}, {"val/error": 3.0, "returns/var": 6.0}]
    stats = training_stats(passes, np.array([[1.0, 2.0]]), np.array([[True, False]]))
    assert stats["ppo/val/error"] == 2.0
    assert stats["ppo/val/var_explained"] == 1 - 2.0 / 5.0
    assert stats["ppo/policy/advantages"].tolist() == [1.0]


def test_deviations_are_unbiased_and_of_one_value_unknown():
    assert standard_deviation(np.array([1.0, 3.0])) == math.sqrt(2)
    assert math.isnan(standard_deviation(np.array([1.0])))
    assert length_stats([2, 4], [1, 1])["tokens/queries_len_std"] == math.sqrt(2)
    assert reward_stats(np.array([1.0, 3.0]))["env/reward_std"] == math.sqrt(2)


def test_scalars_leave_distributions_out():
    assert scalars({"a": 1.0, "b": np.zeros(1)}) == {"a": 1.0}
