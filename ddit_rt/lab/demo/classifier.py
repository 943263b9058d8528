"""A small convolutional network that reads the caption's attributes off a 128 px image.

It scores samples in tests and quality studies; its weights lie beside this file. Benchmarks have
another of its kind, for other captions.
"""

import itertools
import pathlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ddit_rt.lab.demo.images import ATTRIBUTE_SIZES, Attributes

_SIDE = 128


class AttributeClassifier(nn.Module):
    """Strided convolutions, averages over a 4 x 4 grid, one linear layer (95 thousand weights)."""

    def __init__(self, sizes: Mapping[str, int] = ATTRIBUTE_SIZES) -> None:
        """Build with random weights; see `load_classifier` for the trained ones.

        Args:
            sizes: Number of classes of each attribute; by default the demo captions'.
        """
        super().__init__()
        self.sizes = dict(sizes)
        widths = (3, 16, 24, 40, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(4, after),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())
        self.head = nn.Linear(64 * 16, sum(self.sizes.values()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Score images.

        Args:
            images: ``[B, 3, H, W]`` RGB in [0, 1]; sizes other than 128 px are resized.

        Returns:
            ``[B, sum of sizes]`` scores, attribute by attribute.
        """
        features = self.feature_maps(images)
        return torch.as_tensor(self.head(F.adaptive_avg_pool2d(features, 4).flatten(1)))

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """What the last layer sees before it averages, ``[B, 64, 8, 8]``."""
        if images.shape[-2:] != (_SIDE, _SIDE):
            images = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear")
        return torch.as_tensor(self.features(images * 2 - 1))


def weights_path() -> pathlib.Path:
    """File of the trained weights."""
    return pathlib.Path(__file__).parent / "classifier.safetensors"


def load_classifier(
    path: pathlib.Path | None = None, sizes: Mapping[str, int] = ATTRIBUTE_SIZES
) -> AttributeClassifier:
    """A trained classifier, in evaluation mode; without arguments that of the demo's captions."""
    classifier = AttributeClassifier(sizes)
    classifier.load_state_dict(load_file(path or weights_path()))
    return classifier.eval()


def attribute_hits(
    classifier: AttributeClassifier, images: torch.Tensor, expected: list[Attributes]
) -> dict[str, torch.Tensor]:
    """Which images show the expected attribute.

    Args:
        classifier: A trained classifier.
        images: ``[B, 3, H, W]`` RGB in [0, 1].
        expected: The attributes that each image should show.

    Returns:
        For each attribute name a boolean tensor ``[B]``.

    Raises:
        ValueError: If the numbers of images and of expectations differ.
    """
    if len(images) != len(expected):
        raise ValueError(
            f"got {len(images)} images and {len(expected)} expectations; pass one for each"
        )
    with torch.no_grad():
        parts = classifier(images.float()).split(list(ATTRIBUTE_SIZES.values()), dim=1)
    labels = torch.tensor([attributes.labels for attributes in expected], device=images.device)
    return {
        name: part.argmax(1) == labels[:, i]
        for i, (name, part) in enumerate(zip(ATTRIBUTE_SIZES, parts, strict=True))
    }


def image_features(classifier: AttributeClassifier, images: torch.Tensor) -> torch.Tensor:
    """Features for a Fréchet distance between sets of images.

    Means over the whole image of the classifier's last 64 channels: few enough that some hundred
    images give their covariance, and without a place in the image, as Inception's are.

    Args:
        classifier: A trained classifier.
        images: ``[B, 3, H, W]`` RGB in [0, 1].

    Returns:
        ``[B, 64]``.
    """
    with torch.no_grad():
        return classifier.feature_maps(images.float()).mean(dim=(2, 3))
