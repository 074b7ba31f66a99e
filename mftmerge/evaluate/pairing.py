"""Two models on the same rows: the difference of a per-token (or per-row) mean, and its standard error.

Measurements are arrays of shape (rows, 2): a row's sum and its weight. For losses that is the sum of the token losses
in nats and the number of tokens; for a share of right answers it is 0 or 1 and the weight 1. The mean of a measurement
is always sum of sums / sum of weights, so long answers count for more than short ones, as in the training loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mftmerge.errors import BadInput

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """`mean`: a minus b, per token (losses) or per row; `standard_error` of it over rows; `n` rows.

    The standard error is infinite for fewer than two rows: one row says nothing about the next one.
    """

    mean: float
    standard_error: float
    n: int

    def verdict(self, *, lower_is_better: bool = True) -> str:
        """In words, at two standard errors: "gain", "within noise", "no gain", "worse", or "identical".

        "within noise" is a difference in the wanted direction that could be chance; "no gain" is none, or one in the
        unwanted direction that could be chance.
        """
        better = -self.mean if lower_is_better else self.mean
        if self.mean == 0 and self.standard_error == 0:
            return "identical"
        if abs(better) > 2 * self.standard_error:
            return "gain" if better > 0 else "worse"
        return "within noise" if better > 0 else "no gain"


def mean(values: Values) -> float:
    """Sum of sums / sum of weights (nan without any weight)."""
    total = values[:, 1].sum()
    return float(values[:, 0].sum() / total) if total else math.nan


def standard_error(values: Values) -> float:
    """Standard error of `mean(values)` over rows, by the formula of `paired` (infinite for fewer than two rows)."""
    return _ratio_error(values[:, 0], values[:, 1])


def paired(a: Values, b: Values) -> PairedDifference:
    """Difference a - b of two measurements of the same rows, in the same order.

    With d_i = a_i - b_i the difference of the row sums and t_i the weights, the estimate is R = sum d_i / sum t_i.
    Tokens of one row are not independent, so rows are the units (clusters), and the error is that of a ratio estimator,
    by linearisation (the delta method; Cochran, Sampling Techniques, 3rd ed., section 6.4):

        SE(R)^2 = n / (n - 1) * sum_i (d_i - R t_i)^2 / (sum_i t_i)^2

    With equal weights it is the usual standard error of the mean of the d_i.
    Raises BadInput when the rows differ in number or weight.
    """
    difference, weights = _differences(a, b)
    total = weights.sum()
    estimate = float(difference.sum() / total) if total else math.nan
    return PairedDifference(estimate, _ratio_error(difference, weights), len(difference))


def bootstrap(
    a: Values, b: Values, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a - b from drawing rows with replacement, pairs kept together; deterministic by `seed`."""
    difference, weights = _differences(a, b)
    n = len(difference)
    if n < 2:
        return -math.inf, math.inf
    rng = np.random.default_rng(seed)
    estimates = np.empty(resamples)
    for start in range(0, resamples, 256):  # a piece at a time: memory stays at 256 x rows
        drawn = rng.integers(0, n, (min(256, resamples - start), n))
        estimates[start : start + len(drawn)] = difference[drawn].sum(1) / np.maximum(weights[drawn].sum(1), 1e-300)
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _differences(a: Values, b: Values) -> tuple[Values, Values]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or not np.array_equal(a[:, 1], b[:, 1]):
        raise BadInput("paired comparison: the two results are not of the same rows; evaluate both on the same data")
    return a[:, 0] - b[:, 0], a[:, 1]


def _ratio_error(sums: Values, weights: Values) -> float:
    n, total = len(sums), weights.sum()
    if n < 2 or not total:
        return math.inf
    residuals = sums - sums.sum() / total * weights
    return float(math.sqrt(n / (n - 1) * float(residuals @ residuals)) / total)
