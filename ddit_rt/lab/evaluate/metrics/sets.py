"""Distances between sets of images: FID, and the same on the demo classifier's features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from ddit_rt.lab.evaluate.metrics.base import SetMetric, as_tensor
from ddit_rt.lab.evaluate.metrics.fidelity import TORCHMETRICS
from ddit_rt.lab.measure.statistics import Array, frechet_distance, gaussian
from ddit_rt.lab.measure.timing import Pixels


class FrechetDistance(SetMetric):
    """Fréchet distance of Gaussians fitted to a network's features (Heusel et al., 2017).

    The network takes `[1, 3, H, W]` bytes to features `[1, D]`.
    """

    higher_is_better = False

    def __init__(self, device: str = "cpu") -> None:
        """Takes the device that the network runs on."""
        self._device = device

    def distances(
        self, sets: Mapping[str, Iterable[Pixels]], references: Iterable[Pixels]
    ) -> dict[str, float]:
        """See `SetMetric.distances`."""
        wanted = gaussian(self._features(references))
        return {
            name: frechet_distance(*gaussian(self._features(images)), *wanted)
            for name, images in sets.items()
        }

    @torch.no_grad()
    def _features(self, images: Iterable[Pixels]) -> Array:
        rows = [self.network(as_tensor(image, self._device))[0] for image in images]
        return np.asarray(torch.stack(rows).double().cpu())


class Fid(FrechetDistance):
    """Fréchet inception distance, with the weights of torch-fidelity, by torchmetrics."""

    name, label = "fid", "FID"
    packages: ClassVar = {
        **TORCHMETRICS,
        "torch_fidelity": "pip install torch-fidelity, which needs torchvision",
    }
    hint = "--weights names a folder with its weights in checkpoints/"

    @cached_property
    def network(self) -> Any:
        """See `Metric.network`."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048).inception.to(self._device)


class DemoFrechetDistance(FrechetDistance):
    """Not FID: the same distance on 64 features of the small classifier of the demo's images."""

    name = "demo_frechet"
    label = "FID-like distance on the demo classifier's features"

    @cached_property
    def network(self) -> Any:
        """See `Metric.network`."""
        from ddit_rt.lab.demo.classifier import load_classifier

        classifier = load_classifier().to(self._device)
        return lambda image: classifier.features(image.float() / 127.5 - 1).mean(dim=(2, 3))
