"""Intervals and distances, by closed forms and by trial."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddit_rt.lab.measure.statistics import (
    frechet_distance,
    gaussian,
    mean_interval,
    share_interval,
)


def test_mean_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = mean_interval(rng.normal(3, 2, size=40).tolist(), seed=trial)
        hits += found.low <= 3 <= found.high
    # Binomial with p = .95, n = 200 has a standard deviation of 3; the bootstrap is a bit narrow.
    assert 178 <= hits <= 199


def test_mean_interval_of_equal_values_is_a_point():
    found = mean_interval([0.1] * 7)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 1e-12


def test_mean_interval_of_one_value_is_unknown():
    found = mean_interval([2.0])
    assert found.value == 2
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_mean_interval_refuses(values):
    with pytest.raises(ValueError, match="expected one finite value or more"):
        mean_interval(values)


def test_share_interval_solves_wilsons_equation():
    # Its ends are the p whose distance from the share is z standard errors under p.
    found = share_interval(39, 64)
    for end in (found.low, found.high):
        z = abs(39 / 64 - end) / math.sqrt(end * (1 - end) / 64)
        assert z == pytest.approx(1.959964, abs=1e-6)


def test_share_interval_stays_in_range():
    assert share_interval(0, 8).low == 0
    assert share_interval(8, 8).high == pytest.approx(1)


@pytest.mark.parametrize(("wins", "total"), [(1, 0), (-1, 4), (5, 4)])
def test_share_interval_refuses(wins, total):
    with pytest.raises(ValueError, match="expected a count"):
        share_interval(wins, total)


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_diagonal_gaussians_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.normal(size=(2, 6))
    std_a, std_b = rng.uniform(0.1, 2, size=(2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    # The same rotation of both changes no distance, and makes the covariances full.
    turn = rotation(6, 1)
    for basis in (np.eye(6), turn):
        found = frechet_distance(
            basis @ mean_a,
            basis @ np.diag(std_a**2) @ basis.T,
            basis @ mean_b,
            basis @ np.diag(std_b**2) @ basis.T,
        )
        assert found == pytest.approx(expected, rel=1e-10)


def test_covariances_that_do_not_commute_agree_with_a_general_matrix_root() -> None:
    turn = rotation(4, 2)
    cov_a = np.diag([1.0, 2.0, 3.0, 4.0])
    cov_b = turn @ np.diag([0.5, 1.0, 4.0, 9.0]) @ turn.T
    # Eigenvalues of the product, which is not symmetric, but similar to one that is.
    overlap = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    zero = np.zeros(4)
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    assert frechet_distance(zero, cov_a, zero, cov_b) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_features_need_no_regularisation() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(5, 20))
    own = gaussian(features)
    # Sums of 20 numbers of order 1, in double.
    assert frechet_distance(*own, *own) < 1e-12
    shifted = gaussian(features + 2.0)
    assert frechet_distance(*own, *shifted) == pytest.approx(20 * 4.0, rel=1e-12)


def test_gaussian_is_the_mean_and_covariance_of_samples() -> None:
    mean, cov = gaussian(np.array([[0.0, 1.0], [2.0, 5.0]]))
    np.testing.assert_allclose(mean, [1, 3])
    np.testing.assert_allclose(cov, [[2, 4], [4, 8]])
    assert gaussian(np.array([[0.0], [2.0]]))[1].shape == (1, 1)


def test_bad_input_is_named() -> None:
    eye = np.eye(2)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        frechet_distance(np.zeros(2), eye, np.zeros(3), eye)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.zeros(2), eye, np.array([0.0, np.nan]), eye)
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        gaussian(np.zeros((1, 2)))
