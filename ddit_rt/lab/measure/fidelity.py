"""How close pictures are to reference pictures: PSNR and SSIM, by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddit_rt.lab.measure.timing import Picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Closeness to reference pictures.

    Attributes:
        psnr: Peak signal-to-noise ratio of each picture in dB; None where it equals its
            reference, for which the ratio is infinite.
        ssim: Structural similarity of each picture, at most 1.
    """

    psnr: tuple[float | None, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float | None:
        """Mean over the pictures that differ from their reference; None when none does."""
        finite = [value for value in self.psnr if value is not None]
        return sum(finite) / len(finite) if finite else None

    @property
    def mean_ssim(self) -> float:
        """Mean over all pictures."""
        return sum(self.ssim) / len(self.ssim)


def fidelity(pictures: Sequence[Picture], references: Sequence[Picture]) -> Fidelity:
    """Compares pictures with references of the same size, one by one.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed; the message names the extra.
    """
    functions = _metrics()
    psnr: list[float | None] = []
    ssim: list[float] = []
    for picture, reference in zip(pictures, references, strict=True):
        pair = _tensor(picture), _tensor(reference)
        ratio = float(functions.peak_signal_noise_ratio(*pair, data_range=1.0))
        psnr.append(ratio if math.isfinite(ratio) else None)
        ssim.append(float(functions.structural_similarity_index_measure(*pair, data_range=1.0)))
    return Fidelity(psnr=tuple(psnr), ssim=tuple(ssim))


def _metrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"PSNR and SSIM need torchmetrics ({error}); pip install 'ddit_rt[demo]'"
        ) from error
    return image


def _tensor(picture: Picture) -> torch.Tensor:
    """`[H, W, 3]` bytes to `[1, 3, H, W]` in [0, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
