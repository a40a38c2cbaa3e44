"""What PPO carries from step to step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.trainer.control import RunningMoments, adapt_kl_coef, scale_scores

scores = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 128 / 10000)),
        (60.0, 0.2 * (1 + 0.2 * 128 / 10000)),  # the error is clipped
        (-60.0, 0.2 * (1 - 0.2 * 128 / 10000)),
    ],
)
def test_the_kl_coefficient_moves_towards_the_target(kl, expected):
    assert adapt_kl_coef(0.2, kl, target=6.0, horizon=10000, sequences=128) == pytest.approx(expected, rel=1e-12)


@given(st.lists(scores, min_size=1, max_size=4))
def test_moments_of_batches_are_the_moments_of_all_scores_together(batches):
    moments = RunningMoments()
    for batch in batches:
        moments = moments.update(np.array(batch))
    together = np.concatenate(batches)
    assert moments.mean == pytest.approx(together.mean(), rel=1e-9, abs=1e-9)
    assert moments.std == pytest.approx(together.std(ddof=1), rel=1e-6, abs=1e-6)
    assert moments.count == len(together)


def test_one_score_alone_is_not_divided_by_nothing():
    scaled, moments = scale_scores(np.array([3.0]), RunningMoments(), normalize=False)
    assert scaled[0] == pytest.approx(3.0, rel=1e-6)
    assert moments.std == 1.0


def test_scaling_divides_by_the_deviation_and_normalizing_also_takes_the_mean_away():
    batch = np.array([1.0, 3.0])
    scaled, _ = scale_scores(batch, RunningMoments(), normalize=False)
    normalized, _ = scale_scores(batch, RunningMoments(), normalize=True)
    np.testing.assert_allclose(scaled, batch / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(normalized, [-1 / np.sqrt(2), 1 / np.sqrt(2)], rtol=1e-6)
