"""How close clips are to reference clips, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ddit_rt.lab.measure.fidelity import Fidelity, fidelity
from ddit_rt.lab.measure.timing import Picture


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
