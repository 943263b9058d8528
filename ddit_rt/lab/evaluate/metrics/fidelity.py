"""Fidelity to full resolution: of images PSNR, SSIM, LPIPS; of recordings SNR, STFT similarity."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch

from ddit_rt.lab.evaluate.metrics.base import Case, ImageMetric, as_tensor
from ddit_rt.lab.measure.fidelity import fidelity
from ddit_rt.lab.measure.measures import SOUND, signal_to_noise, stft_similarity

TORCHMETRICS = {"torchmetrics": "pip install 'ddit_rt[eval]'"}


class Psnr(ImageMetric):
    """Peak signal-to-noise ratio, by torchmetrics."""

    name, label, higher_is_better, needs_reference = "psnr", "PSNR, dB", True, True
    packages: ClassVar = TORCHMETRICS

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`."""
        return fidelity([case.image], [case.reference]).psnr[0]


class Ssim(ImageMetric):
    """Structural similarity (Wang et al., 2004), by torchmetrics."""

    name, label, higher_is_better, needs_reference = "ssim", "SSIM", True, True
    packages: ClassVar = TORCHMETRICS

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`."""
        return fidelity([case.image], [case.reference]).ssim[0]


class Snr(ImageMetric):
    """Signal-to-noise ratio of a recording."""

    name, label, higher_is_better, needs_reference = "snr", f"{SOUND.ratio}, dB", True, True

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`."""
        return signal_to_noise(case.image, case.reference)


class StftSimilarity(ImageMetric):
    """1 - spectral convergence of a recording; see `measures.py`."""

    name, label, higher_is_better, needs_reference = SOUND.key, SOUND.name, True, True

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`."""
        return stft_similarity(case.image, case.reference)


class Lpips(ImageMetric):
    """Learned perceptual distance (Zhang et al., 2018) on AlexNet, by torchmetrics.

    torchvision holds the network, whose weights come from torch.hub's folder.
    """

    name, label, higher_is_better, needs_reference = "lpips", "LPIPS (AlexNet)", False, True
    packages: ClassVar = {
        **TORCHMETRICS,
        "torchvision": "pip install torchvision, the build that fits this torch",
    }
    hint = "--weights names a folder with its weights in checkpoints/"

    def __init__(self, device: str = "cpu") -> None:
        """The device that it runs on."""
        self._device = device

    @cached_property
    def network(self) -> Any:
        """See `Metric.network`."""
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Network

        return Network(net_type="alex", normalize=True).to(self._device)

    def score(self, case: Case) -> float | None:
        """See `ImageMetric.score`."""
        pair = [as_tensor(p, self._device).float() / 255 for p in (case.image, case.reference)]
        with torch.no_grad():
            return float(self.network(*pair))
