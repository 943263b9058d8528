"""Whether videos show what their captions ask for."""

from __future__ import annotations

import torch

from ddit_rt.lab.demo.classifier import attribute_hits, load_classifier
from ddit_rt.lab.demo.images import Attributes
from ddit_rt.lab.demo.videos import STEPS, VideoAttributes

_MARGIN = 1 / 10
"""Share of the side that is cut off: the classifier knows shapes that fill more of an image."""


def video_hits(videos: torch.Tensor, expected: list[VideoAttributes]) -> dict[str, torch.Tensor]:
    """Which videos show the expected attribute.

    Shape and colours are what the classifier of the images finds in the middle frame; the
    direction is that from the centre of change in the first frame to that in the last.

    Args:
        videos: `[B, F, 3, H, W]`, RGB in [0, 1].
        expected: What each video should show.

    Returns:
        For each attribute name a boolean tensor `[B]`.
    """
    images = [
        Attributes(
            shape=a.shape,
            colour=a.colour,
            background=a.ground,
            background_colour=a.ground_colour,
        )
        for a in expected
    ]
    classifier, middle = load_classifier(), videos[:, videos.shape[1] // 2]
    hits = attribute_hits(classifier, middle, images)
    margin = round(middle.shape[-1] * _MARGIN)
    closer = middle[..., margin:-margin, margin:-margin]
    hits["shape"] = attribute_hits(classifier, closer, images)["shape"]
    names = list(STEPS)
    units = torch.tensor([STEPS[name] for name in names], dtype=videos.dtype)
    found = ((_centres(videos, -1) - _centres(videos, 0)) @ units.T).argmax(1)
    wanted = torch.tensor([names.index(a.direction) for a in expected])
    return {**hits, "direction": found == wanted}


def _centres(videos: torch.Tensor, frame: int) -> torch.Tensor:
    """Centre ``[B, 2]``, x and y, of what in a frame differs from the median of all frames."""
    change = (videos[:, frame] - videos.median(dim=1).values).abs().sum(1)
    # Squared: the shape changes pixels by more than the noise of a texture does.
    weight = change.square() / change.square().sum((1, 2), keepdim=True)
    height, width = change.shape[1:]
    x = (weight.sum(1) * torch.arange(width)).sum(1)
    y = (weight.sum(2) * torch.arange(height)).sum(1)
    return torch.stack([x, y], dim=1)
