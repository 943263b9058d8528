"""SeaCache's signal, against the filter of diffusers' own hook."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks.sea_cache import _apply_sea_filter
from models import noise
from torch import Tensor

from ddit_rt.steps import LatentSignal

SIGMAS = torch.tensor([1.0, 0.83, 0.4, 0.02])


def published(latents: Tensor, sigma: float, power_exp: float) -> Tensor:
    """diffusers' filter of `[C, H, W]` or `[C, F, H, W]`; its axes are frames, rows and columns."""
    video = latents if latents.ndim == 4 else latents.unsqueeze(1)
    return _apply_sea_filter(video.movedim(0, -1), sigma, power_exp).movedim(-1, 0)


@pytest.mark.parametrize("shape", [(2, 4, 16, 24), (2, 4, 5, 8, 6), (1, 3, 1, 25)])
@pytest.mark.parametrize("power_exp", [3.0, 2.0])
def test_equals_diffusers_change(shape: tuple[int, ...], power_exp: float) -> None:
    """Of images, videos, and recordings, whose one row is an axis without frequencies."""
    signal = LatentSignal(shape, SIGMAS, power_exp)
    assert signal.rows == shape[0]
    for step in (1, 2, 3):
        now, before = noise(*shape, seed=step), noise(*shape, seed=step - 1)
        expected = []
        for one, last in zip(now, before, strict=True):
            filtered = published(one, float(SIGMAS[step]), power_exp)
            previous = published(last, float(SIGMAS[step - 1]), power_exp)
            expected.append((filtered - previous).abs().mean() / previous.abs().mean())
        change = signal.change(now, before, torch.tensor([step]))
        # float32 sums of some hundred terms, in another order than a Fourier transform's.
        torch.testing.assert_close(change, torch.stack(expected), rtol=1e-4, atol=0)


def test_a_picture_that_stays_at_its_level_has_not_changed() -> None:
    signal = LatentSignal((1, 4, 8, 8), torch.tensor([0.5, 0.5]), 3.0)
    latents = noise(1, 4, 8, 8)
    assert float(signal.change(latents, latents, torch.tensor([1]))) == 0.0


def test_near_the_end_nothing_is_filtered_away() -> None:
    """At noise level 0 all is signal: the change is the latents' own."""
    signal = LatentSignal((1, 4, 8, 8), torch.tensor([1e-6, 1e-6]), 3.0)
    now, before = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    plain = (now - before).abs().mean() / before.abs().mean()
    change = signal.change(now, before, torch.tensor([1]))
    torch.testing.assert_close(change, plain.reshape(1), rtol=1e-3, atol=0)
