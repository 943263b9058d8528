"""The power law of latents, on latents of a known one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import noise
from torch import Tensor

from ddit_rt.lab.calibrate.cache_fit import power_law
from ddit_rt.steps.buckets import dct


def latents(amplitude: float, decay: float, *shape: int, seed: int = 0) -> Tensor:
    """Noise of the power amplitude w^-decay."""
    height, width = shape[-2:]
    shorter = min(side for side in (height, width) if side > 1)
    rows, columns = (np.arange(side) / (2 * side) * shorter for side in (height, width))
    frequency = np.hypot(rows[:, None], columns[None, :])
    frequency[0, 0] = 0.5
    scale = torch.from_numpy(np.sqrt(amplitude * frequency**-decay))
    spectrum = noise(*shape, seed=seed).double() * scale
    return (dct(height).T @ spectrum @ dct(width)).float()


@pytest.mark.parametrize(
    ("amplitude", "decay", "shape"),
    [
        (200.0, 1.9, (2, 8, 64, 64)),
        (5.0, 2.5, (1, 8, 3, 40, 64)),
        (1.0, 1.0, (4, 64, 1, 250)),
    ],
)
def test_a_known_law_is_found(amplitude: float, decay: float, shape: tuple[int, ...]) -> None:
    found = power_law([latents(amplitude, decay, *shape, seed=seed) for seed in range(4)])
    # Means over 32 draws and more of each coefficient, whose logarithm lies 1 / 32 too low.
    assert found[0] == pytest.approx(amplitude, rel=0.15)
    assert found[1] == pytest.approx(decay, abs=0.05)
    assert found[2] < 0.15


def test_white_noise_is_flat() -> None:
    amplitude, decay, _ = power_law([noise(2, 16, 64, 64)])
    assert amplitude == pytest.approx(1.0, rel=0.05)
    assert decay == pytest.approx(0.0, abs=0.02)


def test_latents_that_tell_no_spectrum_are_refused() -> None:
    for shapes, message in (
        ([(1, 4, 6, 64)], "6 x 64; a spectrum needs sides of 8"),
        ([(1, 4, 1, 1)], "1 x 1; a spectrum"),
        ([(1, 4, 16, 16), (1, 4, 16, 8)], r"sizes \[\(16, 8\), \(16, 16\)\]; expected some of one"),
        ([], r"sizes \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            power_law([noise(*shape) for shape in shapes])
