"""How sure a mean or a share is, and how far two sets of features are from each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its 95% confidence interval, `low <= value <= high`."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean, with the percentile bootstrap interval over the values (Efron, 1979).

    One value per prompt, means over its seeds where there are several: images of one prompt are
    not independent of each other.

    Args:
        values: At least one, all finite. One alone has no spread to tell of: its interval is NaN.
        seed: Seed of the resampling.

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
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
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
    z = statistics.NormalDist().inv_cdf((1 + _LEVEL) / 2)
    share = wins / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

        d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    Source: Dowson and Landau, 1982; of features of images: Heusel et al., arXiv 1706.08500. The
    trace of the root is the sum of the singular values of `C_a^(1/2) C_b^(1/2)`, so covariances
    without full rank (fewer images than features) need no regularisation.

    Args:
        mean_a: `[D]`.
        cov_a: `[D, D]`, symmetric, positive semi-definite.
        mean_b: `[D]`.
        cov_b: `[D, D]`, likewise.

    Returns:
        The distance, at least 0; as with FID the square root is not taken.

    Raises:
        ValueError: Shapes that do not fit each other, or values that are not finite.
    """
    mean_a, cov_a, mean_b, cov_b = (
        np.asarray(value, dtype=np.float64) for value in (mean_a, cov_a, mean_b, cov_b)
    )
    size = mean_a.shape[0] if mean_a.ndim == 1 else -1
    shapes = [value.shape for value in (mean_a, cov_a, mean_b, cov_b)]
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"got shapes {shapes}; expected [D], [D, D], [D], [D, D]")
    if not all(np.isfinite(value).all() for value in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("a mean or covariance holds NaN or infinity; check the images")
    overlap = float(np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum())
    difference = mean_a - mean_b
    distance = float(difference @ difference + np.trace(cov_a) + np.trace(cov_b)) - 2 * overlap
    return max(0.0, distance)  # equal sets: rounding may leave it just below


def gaussian(features: Array) -> tuple[Array, Array]:
    """Mean `[D]` and covariance `[D, D]` (ddof = 1) of features `[N, D]`, N at least 2.

    Raises:
        ValueError: Another shape.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"got features of shape {features.shape}; expected [N, D], N at least 2")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _root(matrix: Array) -> Array:
    """Symmetric root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)
