"""How close clips are to reference clips frame by frame, and whether they show their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from ddit_rt.demo.classifier import attribute_hits, load_classifier
from ddit_rt.demo.clips import STEPS, ClipAttributes
from ddit_rt.demo.measure import Picture
from ddit_rt.demo.pictures import Attributes
from ddit_rt.demo.quality import Fidelity, fidelity

_MARGIN = 1 / 10
"""Of the side, cut off all round: the classifier knows shapes that fill more of a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFidelity:
    """Closeness to reference clips.

    Attributes:
        frames: Per clip, PSNR and SSIM of its frames.
        flicker: Per clip, mean absolute error of the difference of successive frames, in units of
            the whole range; 0 where the clip moves exactly as its reference.
    """

    frames: tuple[Fidelity, ...]
    flicker: tuple[float, ...]

    @property
    def clips(self) -> Fidelity:
        """Means over the frames of each clip, as the fidelity of one picture per clip."""
        return Fidelity(
            psnr=tuple(clip.mean_psnr for clip in self.frames),
            ssim=tuple(clip.mean_ssim for clip in self.frames),
        )

    @property
    def mean_flicker(self) -> float:
        """Mean over the clips."""
        return fmean(self.flicker)


def clip_fidelity(clips: Sequence[Picture], references: Sequence[Picture]) -> ClipFidelity:
    """Compares clips `[F, H, W, 3]` with references of the same size, one by one.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed; the message names the extra.
    """
    pairs = list(zip(clips, references, strict=True))
    return ClipFidelity(
        frames=tuple(fidelity(list(clip), list(reference)) for clip, reference in pairs),
        flicker=tuple(_flicker(clip, reference) for clip, reference in pairs),
    )


def _flicker(clip: Picture, reference: Picture) -> float:
    error = clip.astype(np.float64) - reference.astype(np.float64)
    return float(np.abs(np.diff(error, axis=0)).mean() / 255) if len(error) > 1 else 0.0


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
