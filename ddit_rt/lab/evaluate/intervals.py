"""Confidence intervals over prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its 95% confidence interval, `low <= value <= high`."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean, with the percentile bootstrap interval over the values (Efron, 1979).

    One value per prompt, means over its seeds where there are several: pictures of one prompt are
    not independent of each other.

    Args:
        values: At least one, all finite. One alone has no spread to tell of: its interval is NaN.
        seed: Of the resampling.

    Raises:
        ValueError: No value, or one that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"got {list(values)}; expected one finite value or more")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(value=mean, low=math.nan, high=math.nan)
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(values), size=(_RESAMPLES, len(values)))
    means = np.asarray(values, dtype=np.float64)[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Resampled means of equal values differ from theirs by rounding.
    return Interval(value=mean, low=min(mean, float(low)), high=max(mean, float(high)))


def share_interval(wins: float, total: int) -> Interval:
    """A share with Wilson's score interval (Wilson, 1927).

    Args:
        wins: How many of `total`; a tie may count as a half.
        total: At least 1.

    Raises:
        ValueError: A count out of range.
    """
    if total < 1 or not 0 <= wins <= total:
        raise ValueError(f"got {wins} of {total}; expected a count from 0 to a positive total")
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = wins / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))
