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


# -- shares of right answers ------------------------------------------------------------------------------------------

Z95 = 1.959963984540054


def wilson(right: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): 95 % by default, never outside of 0 to 1, and not empty at 0 or n."""
    if not n:
        return 0.0, 1.0
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def are_marks(*values: Values) -> bool:
    """Whether measurements are marks of answers: 0 or 1, each of weight 1."""
    return all(bool(np.isin(v[:, 0], (0, 1)).all() and (v[:, 1] == 1).all()) for v in values)


def mcnemar(a: Values, b: Values) -> float:
    """Two-sided p of "both are right equally often", exact: of the rows where they differ, half should go each way.

    McNemar's test with binomial probabilities. a, b: marks of the same rows.
    """
    difference, _ = _differences(a, b)
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    n = up + down
    tail = sum(math.comb(n, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2**n)


def newcombe(a: Values, b: Values, z: float = Z95) -> tuple[float, float]:
    """Interval of the difference of two shares over the same rows, from their Wilson intervals and correlation.

    Method 10 of Newcombe (1998, Statistics in Medicine 17:2635), which holds its level for few rows, where the normal
    approximation is too narrow.
    """
    difference, _ = _differences(a, b)
    n = len(difference)
    if not n:
        return -1.0, 1.0
    first, second = np.asarray(a)[:, 0] > 0, np.asarray(b)[:, 0] > 0
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    cross = float(both * neither - only_a * only_b)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = cross / math.sqrt(margins) if margins else 0.0
    p, q = float(first.mean()), float(second.mean())
    (low_p, high_p), (low_q, high_q) = wilson(p * n, n, z), wilson(q * n, n, z)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return p - q - reach(p - low_p, high_q - q), p - q + reach(high_p - p, q - low_q)


def visible(difference: PairedDifference) -> float:
    """The true difference that a test of these rows would see four times in five, at 5 % (2.8 standard errors)."""
    return 2.8 * difference.standard_error


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
