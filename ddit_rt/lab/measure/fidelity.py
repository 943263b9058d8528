"""How close images and videos are to references: PSNR and SSIM, by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ddit_rt.lab.measure.timing import Pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Fidelity of images, or means over the frames of videos, to references.

    Attributes:
        psnr: Peak signal-to-noise ratio of each in dB; None where it equals its reference, for
            which the ratio is infinite.
        ssim: Structural similarity of each, at most 1.
    """

    psnr: tuple[float | None, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float | None:
        """Mean over those that differ from their reference; None when none does."""
        finite = [value for value in self.psnr if value is not None]
        return fmean(finite) if finite else None

    @property
    def mean_ssim(self) -> float:
        """Mean over all."""
        return fmean(self.ssim)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFidelity:
    """Fidelity of videos to references.

    Attributes:
        frames: PSNR and SSIM of the frames of each video.
        flicker: Mean absolute error of the difference of successive frames of each video, in units
            of the whole range; 0 where it moves exactly as its reference.
    """

    frames: tuple[Fidelity, ...]
    flicker: tuple[float, ...]

    @property
    def videos(self) -> Fidelity:
        """Means over the frames of each video."""
        return Fidelity(
            psnr=tuple(video.mean_psnr for video in self.frames),
            ssim=tuple(video.mean_ssim for video in self.frames),
        )

    @property
    def mean_flicker(self) -> float:
        """Mean over the videos."""
        return fmean(self.flicker)


def fidelity(images: Sequence[Pixels], references: Sequence[Pixels]) -> Fidelity:
    """Compares images `[H, W, 3]` with references of the same size, one by one.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed; the message names the extra.
    """
    functions = _metrics()
    psnr: list[float | None] = []
    ssim: list[float] = []
    for image, reference in zip(images, references, strict=True):
        pair = _tensor(image), _tensor(reference)
        ratio = float(functions.peak_signal_noise_ratio(*pair, data_range=1.0))
        psnr.append(ratio if math.isfinite(ratio) else None)
        ssim.append(float(functions.structural_similarity_index_measure(*pair, data_range=1.0)))
    return Fidelity(psnr=tuple(psnr), ssim=tuple(ssim))


def video_fidelity(videos: Sequence[Pixels], references: Sequence[Pixels]) -> VideoFidelity:
    """Compares videos `[F, H, W, 3]` with references of the same size, one by one.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed; the message names the extra.
    """
    pairs = list(zip(videos, references, strict=True))
    return VideoFidelity(
        frames=tuple(fidelity(list(video), list(reference)) for video, reference in pairs),
        flicker=tuple(_flicker(video, reference) for video, reference in pairs),
    )


def _metrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"PSNR and SSIM need torchmetrics ({error}); pip install 'ddit_rt[eval]'"
        ) from error
    return image


def _tensor(image: Pixels) -> torch.Tensor:
    """`[H, W, 3]` bytes to `[1, 3, H, W]` in [0, 1]."""
    return torch.tensor(image).permute(2, 0, 1)[None].float() / 255


def _flicker(video: Pixels, reference: Pixels) -> float:
    error = video.astype(np.float64) - reference.astype(np.float64)
    return float(np.abs(np.diff(error, axis=0)).mean() / 255) if len(error) > 1 else 0.0
