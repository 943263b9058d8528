"""By what plans are compared with full resolution: one measure for each kind of thing made.

Of sound it is 1 - spectral convergence (S. Arik et al., 2018, arXiv 1808.06719), the Frobenius
norm of what magnitude spectrograms differ by over that of the reference's, as a mean over the three
resolutions of R. Yamamoto et al. (2020, arXiv 1910.11480). Phases do not count in it; in the
signal-to-noise ratio beside it they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from ddit_rt.lab.measure.fidelity import fidelity, video_fidelity
from ddit_rt.lab.measure.timing import Pixels
from ddit_rt.models.family import Family

_RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))
"""FFT size, hop and Hann window, in samples."""


Closeness = tuple[tuple[float, ...], tuple[float | None, ...]]
"""Similarity of each thing to its reference, and the ratio in dB, None where they are equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A similarity without unit, at most 1, which equal things have; higher is closer.

    Attributes:
        makes: What it compares: `"image"`, `"video"` or `"recording"`.
        key: The similarity's name in options and reports.
        name: Its name for people.
        ratio: Name of the ratio in dB beside it, of which higher is closer too.
        note: What must be said of both.
        compare: Compares images `[H, W, 3]`, videos `[F, H, W, 3]` or recordings `[channels,
            samples]` with references of the same size, one by one.
    """

    makes: str
    key: str
    name: str
    ratio: str
    note: str
    compare: Callable[[Sequence[Pixels], Sequence[Pixels]], Closeness]


def measure_of(family: Family) -> Measure:
    """The measure of what a family's models make."""
    return SOUND if family.audio else VIDEO if family.video else IMAGE


def stft_similarity(sound: Pixels, reference: Pixels) -> float:
    """Of a recording `[channels, samples]`; 1 where its spectrograms are the reference's."""
    apart = []
    for size, hop, window in _RESOLUTIONS:
        ours, theirs = (_magnitudes(one, size, hop, window) for one in (sound, reference))
        # One step of 16 bits stands for a silent reference.
        whole = max(float(torch.linalg.vector_norm(theirs)), 1.0)
        apart.append(float(torch.linalg.vector_norm(ours - theirs)) / whole)
    return 1 - fmean(apart)


def _magnitudes(sound: Pixels, size: int, hop: int, window: int) -> Tensor:
    """Spectrogram `[channels, frequencies, frames]`; what lies beyond the ends is silent."""
    return torch.stft(
        torch.tensor(sound, dtype=torch.float32),
        size,
        hop,
        window,
        window=torch.hann_window(window),
        pad_mode="constant",
        return_complex=True,
    ).abs()


def signal_to_noise(sound: Pixels, reference: Pixels) -> float | None:
    """Of a recording `[channels, samples]`, in dB; None where it equals the reference."""
    ours, theirs = (torch.tensor(one, dtype=torch.float64) for one in (sound, reference))
    noise, signal = (float(one.square().sum()) for one in (ours - theirs, theirs))
    return 10 * math.log10(max(signal, 1.0) / noise) if noise else None


def _images(made: Sequence[Pixels], references: Sequence[Pixels]) -> Closeness:
    found = fidelity(made, references)
    return found.ssim, found.psnr


def _videos(made: Sequence[Pixels], references: Sequence[Pixels]) -> Closeness:
    found = video_fidelity(made, references).videos
    return found.ssim, found.psnr


def _sounds(made: Sequence[Pixels], references: Sequence[Pixels]) -> Closeness:
    pairs = list(zip(made, references, strict=True))
    similarity = tuple(stft_similarity(*pair) for pair in pairs)
    return similarity, tuple(signal_to_noise(*pair) for pair in pairs)


IMAGE = Measure(makes="image", key="ssim", name="SSIM", ratio="PSNR", note="", compare=_images)
VIDEO = Measure(
    makes="video",
    key="ssim",
    name="SSIM",
    ratio="PSNR",
    note=", mean over the frames",
    compare=_videos,
)
SOUND = Measure(
    makes="recording",
    key="stft",
    name="STFT similarity",
    ratio="SNR",
    note=", 1 - spectral convergence at three resolutions",
    compare=_sounds,
)
