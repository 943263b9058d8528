"""The spectrum of a model's latents, by which `SpectralPolicy` decides when to go fine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddit_rt.steps.buckets import dct

_FEWEST = 4
"""Whole frequencies that a line is laid through at least."""
_TINY = 1e-30


def power_law(latents: Sequence[Tensor]) -> tuple[float, float, float]:
    """A and b of the power P(w) = A w^-b at spatial frequency w, in cycles over the shorter side.

    Power is the mean square of the coefficients of an orthonormal cosine transform, in which white
    noise of variance 1 has 1 at every frequency. The line is laid through its logarithms, of which
    the mean around each whole frequency counts once, from 1 to the highest that both sides have.

    Args:
        latents: `[B, C, H, W]`, or `[B, C, F, H, W]` frame by frame, all of one H and W, as the
            model is given them.

    Returns:
        A, b, and the root mean square of what the line misses, in logarithms to base e.

    Raises:
        ValueError: No latents, of several sizes, or too small ones.
    """
    sizes = {tuple(one.shape[-2:]) for one in latents}
    if len(sizes) != 1:
        raise ValueError(f"got latents of the sizes {sorted(sizes)}; expected some of one size")
    ((height, width),) = sizes
    shorter = min(side for side in (height, width) if side > 1) if max(height, width) > 1 else 1
    if shorter < 2 * _FEWEST:
        raise ValueError(
            f"got latents of {height} x {width}; a spectrum needs sides of {2 * _FEWEST} at least"
        )
    rows, columns = dct(height), dct(width)
    squares = [
        (rows @ one.double().cpu() @ columns.T).square().flatten(0, -3).mean(0) for one in latents
    ]
    power = torch.stack(squares).mean(0).clamp(min=_TINY).numpy()
    along = [np.arange(side) / (2 * side) * shorter for side in (height, width)]
    frequency = np.hypot(along[0][:, None], along[1][None, :])
    whole = np.rint(frequency).astype(int)
    places = [place for place in range(1, shorter // 2 + 1) if (whole == place).any()]
    # Means of logarithms: those of a steep law's power around a frequency lie above it.
    means = np.array([np.log(power[whole == place]).mean() for place in places])
    centres = np.array([np.log(frequency[whole == place]).mean() for place in places])
    slope, intercept = np.polyfit(centres, means, 1)
    missed = means - (intercept + slope * centres)
    return math.exp(intercept), -float(slope), float(np.sqrt(np.mean(missed**2)))
