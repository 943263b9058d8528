"""Fréchet distance between Gaussians fitted to features of two sets of pictures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

        d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    Source: Dowson and Landau, 1982; of features of pictures: Heusel et al., arXiv 1706.08500. The
    trace of the root is the sum of the singular values of `C_a^(1/2) C_b^(1/2)`, so covariances
    without full rank (fewer pictures than features) need no regularisation.

    Args:
        mean_a: `[D]`.
        cov_a: `[D, D]`, symmetric, positive semi-definite.
        mean_b: As `mean_a`.
        cov_b: As `cov_a`.

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
        raise ValueError("a mean or covariance holds NaN or infinity; check the pictures")
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
