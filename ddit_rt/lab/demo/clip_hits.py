"""Whether clips show what their captions ask for."""

from __future__ import annotations

import torch

from ddit_rt.lab.demo.classifier import attribute_hits, load_classifier
from ddit_rt.lab.demo.clips import STEPS, ClipAttributes
from ddit_rt.lab.demo.pictures import Attributes

_MARGIN = 1 / 10
"""Of the side, cut off all round: the classifier knows shapes that fill more of a picture."""


def clip_hits(clips: torch.Tensor, expected: list[ClipAttributes]) -> dict[str, torch.Tensor]:
    """Which clips show the expected attribute.

    Shape and colours are what the classifier of the pictures finds in the middle frame; the
    direction is that from the centre of change in the first frame to that in the last.

    Args:
        clips: `[B, F, 3, H, W]`, RGB in [0, 1].
        expected: What each clip should show.

    Returns:
        For each attribute name a boolean tensor `[B]`.
    """
    pictures = [
        Attributes(
            shape=a.shape,
            colour=a.colour,
            background=a.ground,
            background_colour=a.ground_colour,
        )
        for a in expected
    ]
    classifier, middle = load_classifier(), clips[:, clips.shape[1] // 2]
    hits = attribute_hits(classifier, middle, pictures)
    margin = round(middle.shape[-1] * _MARGIN)
    closer = middle[..., margin:-margin, margin:-margin]
    hits["shape"] = attribute_hits(classifier, closer, pictures)["shape"]
    names = list(STEPS)
    units = torch.tensor([STEPS[name] for name in names], dtype=clips.dtype)
    found = ((_centres(clips, -1) - _centres(clips, 0)) @ units.T).argmax(1)
    wanted = torch.tensor([names.index(a.direction) for a in expected])
    return {**hits, "direction": found == wanted}


def _centres(clips: torch.Tensor, frame: int) -> torch.Tensor:
    """Centre ``[B, 2]``, x and y, of what in a frame differs from the median of all frames."""
    change = (clips[:, frame] - clips.median(dim=1).values).abs().sum(1)
    # Squared: the shape changes pixels by more than the noise of a texture does.
    weight = change.square() / change.square().sum((1, 2), keepdim=True)
    height, width = change.shape[1:]
    x = (weight.sum(1) * torch.arange(width)).sum(1)
    y = (weight.sum(2) * torch.arange(height)).sum(1)
    return torch.stack([x, y], dim=1)
