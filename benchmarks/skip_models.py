"""The demo models that benchmarks run on: pipeline, sizes, prompts, and how closeness is taken."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt.cli.models import EMBEDDED, EMBEDDED_VIDEO, load_pipeline
from ddit_rt.lab.demo.images import all_attributes, is_held_out
from ddit_rt.lab.demo.prompts import (
    MAX_SEQUENCE_LENGTH,
    VIDEO_CALL,
    held_out_prompts,
    held_out_video_prompts,
)
from ddit_rt.lab.demo.videos import all_video_attributes, is_held_out_video
from ddit_rt.lab.measure.fidelity import Fidelity, fidelity, video_fidelity
from ddit_rt.lab.measure.timing import Pixels

_GUIDANCE_SCALE = 3.0
"""As in the video demo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Closeness:
    """Closeness to reference pictures or clips, per prompt.

    Attributes:
        ssim: Of a clip the mean over its frames.
        psnr: In dB; None where nothing differs.
        flicker: Of clips the mean absolute error of the change from frame to frame, in units of the
            whole range; None for pictures.
        frames: Of clips SSIM and PSNR of every frame; None for pictures.
    """

    ssim: tuple[float, ...]
    psnr: tuple[float | None, ...]
    flicker: tuple[float, ...] | None = None
    frames: tuple[Fidelity, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipModel:
    """A model to compare plans on.

    Attributes:
        name: As on the command line.
        pipeline: Its pipeline.
        size: `height`, `width` and, of clips, `num_frames`.
        others: Further arguments of a call.
        held_out: Captions to report on.
        seen: Captions for fits and for the search, none of those.
        closeness: Compares what a plan made with the references.
    """

    name: str
    pipeline: Any
    size: Mapping[str, Any]
    others: Mapping[str, Any]
    held_out: tuple[str, ...]
    seen: tuple[str, ...]
    closeness: Callable[[Sequence[Pixels], Sequence[Pixels]], Closeness]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of an engine's call, but for the steps."""
        return {**self.size, **self.others}

    def reported(self, count: int) -> tuple[str, ...]:
        """Some held-out captions, spread evenly over all of them.

        Raises:
            ValueError: There are fewer.
        """
        total = len(self.held_out)
        if count > total:
            raise ValueError(f"got --prompts {count}; {self.name} has {total} held-out captions")
        return tuple(self.held_out[place * total // count] for place in range(count))


def picture_model(*, quick: bool = False) -> SkipModel:
    """The embedded FLUX, 128 x 128."""
    side = 64 if quick else 128
    return SkipModel(
        name=EMBEDDED,
        pipeline=load_pipeline(EMBEDDED),
        size={"height": side, "width": side},
        others={"max_sequence_length": MAX_SEQUENCE_LENGTH},
        held_out=tuple(held_out_prompts()),
        seen=_shuffled([a.caption for a in all_attributes() if not is_held_out(a)]),
        closeness=picture_closeness,
    )


def clip_model(*, quick: bool = False) -> SkipModel:
    """The embedded Wan, 13 frames of 64 x 64, with guidance."""
    frames = 5 if quick else VIDEO_CALL["num_frames"]
    return SkipModel(
        name=EMBEDDED_VIDEO,
        pipeline=load_pipeline(EMBEDDED_VIDEO),
        size={"height": 64, "width": 64, "num_frames": frames},
        others={"max_sequence_length": MAX_SEQUENCE_LENGTH, "guidance_scale": _GUIDANCE_SCALE},
        held_out=tuple(held_out_video_prompts()),
        seen=_shuffled([a.caption for a in all_video_attributes() if not is_held_out_video(a)]),
        closeness=clip_closeness,
    )


def picture_closeness(pictures: Sequence[Pixels], references: Sequence[Pixels]) -> Closeness:
    """Of pictures `[H, W, 3]`."""
    close = fidelity(pictures, references)
    return Closeness(ssim=close.ssim, psnr=close.psnr)


def clip_closeness(clips: Sequence[Pixels], references: Sequence[Pixels]) -> Closeness:
    """Of clips `[F, H, W, 3]`."""
    close = video_fidelity(clips, references)
    return Closeness(
        ssim=close.videos.ssim, psnr=close.videos.psnr, flicker=close.flicker, frames=close.frames
    )


def frame_means(clips: Sequence[Fidelity]) -> list[dict[str, float | None]]:
    """Frame by frame the means over the clips, PSNR over those whose frame differs."""
    frames = zip(*(zip(clip.ssim, clip.psnr, strict=True) for clip in clips), strict=True)
    return [
        {
            "ssim": statistics.fmean(ssim for ssim, _ in frame),
            "psnr": statistics.fmean(found)
            if (found := [psnr for _, psnr in frame if psnr is not None])
            else None,
        }
        for frame in frames
    ]


def _shuffled(captions: list[str]) -> tuple[str, ...]:
    random.Random(0).shuffle(captions)  # noqa: S311 - a fixed choice, nothing secret
    return tuple(captions)


MODELS: dict[str, Callable[..., SkipModel]] = {
    EMBEDDED: picture_model,
    EMBEDDED_VIDEO: clip_model,
}
