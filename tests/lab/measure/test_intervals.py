import math

import numpy as np
import pytest

from ddit_rt.lab.measure.statistics import mean_interval, share_interval


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
