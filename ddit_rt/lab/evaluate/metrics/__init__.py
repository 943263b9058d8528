"""Metrics of an evaluation: the registry, and which of it can run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ddit_rt.lab.evaluate.metrics.base import Case, ImageMetric, Metric, SetMetric
from ddit_rt.lab.evaluate.metrics.fidelity import Lpips, Psnr, Snr, Ssim, StftSimilarity
from ddit_rt.lab.evaluate.metrics.sets import DemoFrechetDistance, Fid
from ddit_rt.lab.evaluate.metrics.text import CLIP_MODEL, ClipScore, ImageReward

__all__ = [
    "CLIP_MODEL",
    "Case",
    "ClipScore",
    "DemoFrechetDistance",
    "Fid",
    "ImageMetric",
    "ImageReward",
    "Lpips",
    "Metric",
    "Psnr",
    "SetMetric",
    "Skipped",
    "Snr",
    "Ssim",
    "StftSimilarity",
    "all_metrics",
    "sound_metrics",
    "usable",
    "weights_folder",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A metric that cannot run here, and why."""

    name: str
    label: str
    reason: str


def all_metrics(
    *,
    device: str = "cpu",
    clip_model: str = CLIP_MODEL,
    weights: Path | None = None,
    demo: bool = False,
) -> list[Metric]:
    """Every metric that there is, unloaded.

    Args:
        device: Device that networks run on.
        clip_model: Folder or Hub name of the CLIP model.
        weights: Folder with the weights of ImageReward; None for the package's own cache.
        demo: Whether the images are the demo model's, whose classifier has features for them.
    """
    metrics: list[Metric] = [Psnr(), Ssim(), Lpips(device), ClipScore(clip_model, device)]
    metrics += [ImageReward(device, weights), Fid(device)]
    return [*metrics, DemoFrechetDistance(device)] if demo else metrics


def sound_metrics() -> list[Metric]:
    """Every metric of recordings."""
    return [Snr(), StftSimilarity()]


def usable(metrics: Sequence[Metric]) -> tuple[list[Metric], list[Skipped]]:
    """The metrics that can run here, and those that cannot, with their reasons."""
    reasons = [(metric, metric.unavailable()) for metric in metrics]
    return [metric for metric, reason in reasons if reason is None], [
        Skipped(name=metric.name, label=metric.label, reason=reason)
        for metric, reason in reasons
        if reason is not None
    ]


@contextmanager
def weights_folder(folder: Path | None) -> Iterator[None]:
    """Makes torch.hub look for weights in a folder (`checkpoints/` in it), LPIPS's and FID's.

    Raises:
        ValueError: No such folder.
    """
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; it should hold weights as torch.hub does")
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(before)
