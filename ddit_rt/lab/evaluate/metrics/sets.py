"""Distances between sets of images: FID, and the same on the demo classifier's features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ddit_rt.lab.evaluate.metrics.base import SetMetric, as_tensor
from ddit_rt.lab.evaluate.metrics.fidelity import TORCHMETRICS
from ddit_rt.lab.measure.timing import Pixels


class FrechetDistance(SetMetric):
    """Frechet distance of Gaussians fitted to features (Heusel et al., 2017), by torchmetrics."""

    higher_is_better = False

    def __init__(self, device: str = "cpu") -> None:
        """The device that it runs on."""
        self._device = device
        self._metric: Any = None

    @abstractmethod
    def feature(self) -> Any:
        """What torchmetrics takes as `feature`: a layer's width, or a module."""

    def load(self) -> None:
        """See `Metric.load`."""
        if self._metric is None:
            from torchmetrics.image.fid import FrechetInceptionDistance

            self._metric = FrechetInceptionDistance(
                feature=self.feature(), reset_real_features=False
            )

    def distances(
        self, sets: Mapping[str, Iterable[Pixels]], references: Iterable[Pixels]
    ) -> dict[str, float]:
        """See `SetMetric.distances`."""
        self.load()
        metric = self._metric.to(self._device)
        metric.reset_real_features = True
        metric.reset()
        metric.reset_real_features = False
        self._update(metric, references, real=True)
        found = {}
        for name, images in sets.items():
            self._update(metric, images, real=False)
            # A product of rounded matrices may come out a rounding error below zero.
            found[name] = max(0.0, float(metric.compute()))
            metric.reset()
        return found

    def _update(self, metric: Any, images: Iterable[Pixels], *, real: bool) -> None:
        with torch.no_grad():
            for image in images:
                metric.update(as_tensor(image, self._device), real=real)


class Fid(FrechetDistance):
    """Frechet inception distance, with the weights of torch-fidelity."""

    name, label = "fid", "FID"
    packages: ClassVar = {
        **TORCHMETRICS,
        "torch_fidelity": "pip install torch-fidelity, which needs torchvision",
    }
    hint = "--weights names a folder with its weights in checkpoints/"

    def feature(self) -> int:
        """See `FrechetDistance.feature`."""
        return 2048


class DemoFrechetDistance(FrechetDistance):
    """Not FID: the same distance on 64 features of the small classifier of the demo's images."""

    name = "demo_frechet"
    label = "FID-like distance on the demo classifier's features"
    packages: ClassVar = TORCHMETRICS

    def feature(self) -> nn.Module:
        """See `FrechetDistance.feature`."""
        from ddit_rt.lab.demo.classifier import load_classifier

        return _DemoFeatures(load_classifier())


class _DemoFeatures(nn.Module):
    """`[B, 3, H, W]` bytes to `[B, 64]`: the classifier's last feature map, averaged."""

    num_features = 64

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.classifier.features(images.float() / 127.5 - 1)
        return torch.as_tensor(features.mean(dim=(2, 3)))
