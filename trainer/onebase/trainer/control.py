"""What PPO carries from step to step besides the weights: the KL coefficient and the scores' running moments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FLOAT32_EPS = float(np.finfo(np.float32).eps)


def adapt_kl_coef(coef: float, kl: float, *, target: float, horizon: float, sequences: int) -> float:
    """The next KL coefficient (Ziegler et al. 2019, section 2.2).

    Args:
        coef: the coefficient that was used.
        kl: the KL per sequence that came of it, in nats.
        target: the KL wanted.
        horizon: sequences over which to adapt.
        sequences: sequences of the batch.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * sequences / horizon)


@dataclass(frozen=True)
class RunningMoments:
    """Mean and standard deviation of all scores so far, by the parallel algorithm (Chan et al. 1979)."""

    mean: float = 0.0
    std: float = 1.0
    var: float = 1.0
    count: float = 1e-24  # nearly nothing, so that the first batch decides

    def update(self, scores: NDArray[np.float64]) -> RunningMoments:
        """The moments with a batch of scores [B] added. Of one score alone the deviation stays 1."""
        size = len(scores)
        delta = float(scores.mean()) - self.mean
        total = self.count + size
        squares = self.var * self.count + delta**2 * self.count * size / total + float(scores.var()) * size
        return RunningMoments(
            mean=self.mean + delta * size / total,
            std=math.sqrt(squares / (total - 1)) if total > 1 else 1.0,
            var=squares / total,
            count=total,
        )


def scale_scores(
    scores: NDArray[np.float64], moments: RunningMoments, *, normalize: bool
) -> tuple[NDArray[np.float64], RunningMoments]:
    """Divides scores [B] by their running deviation, this batch included; `normalize` also subtracts the mean."""
    moments = moments.update(scores)
    centered = scores - moments.mean if normalize else scores
    return centered / (moments.std + _FLOAT32_EPS), moments
