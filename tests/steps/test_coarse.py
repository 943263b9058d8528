"""The training-free coarse step: exact where it must be exact."""

import pytest
import torch
from models import noise

from ddit_rt.steps import matched_level


def test_matched_level_by_hand():
    # t = 0.5, s = 2: a = 0.5, b = 0.25, so z' = z_low / 0.75 at t' = 1/3.
    scale, level = matched_level(torch.tensor([1.0, 0.5]), 2)
    torch.testing.assert_close(scale, torch.tensor([2.0, 4 / 3]))
    torch.testing.assert_close(level, torch.tensor([1.0, 1 / 3]))


@pytest.mark.parametrize("multiple", [2, 4])
def test_reduced_noise_has_the_variance_of_its_level(multiple):
    """White noise at level t, averaged and rescaled, has standard deviation t'."""
    sigmas = torch.tensor([0.8])
    scale, level = matched_level(sigmas, multiple)
    latents = sigmas * noise(1, 64, 128, 128)
    low = torch.nn.functional.avg_pool2d(latents, multiple) * scale
    # 64 * (128 / s)^2 samples: one part in 500 is four standard errors at s = 4.
    assert float(low.std()) == pytest.approx(float(level), rel=8e-3)


def test_multiple_one_changes_nothing():
    sigmas = torch.tensor([0.9, 0.3])
    scale, level = matched_level(sigmas, 1)
    torch.testing.assert_close(scale, torch.ones(2))
    torch.testing.assert_close(level, sigmas)
