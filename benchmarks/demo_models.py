"""The demo models that plans are compared on: pipeline, sizes, prompts, and what fidelity is."""

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
class Compared:
    """Fidelity of images or videos, per prompt.

    Attributes:
        ssim: To the reference, of a video the mean over its frames.
        psnr: In dB; None where nothing differs.
        flicker: Of videos the mean absolute error of the change from frame to frame, in units of
            the whole range; None for images.
        frames: Of videos SSIM and PSNR of every frame; None for images.
    """

    ssim: tuple[float, ...]
    psnr: tuple[float | None, ...]
    flicker: tuple[float, ...] | None = None
    frames: tuple[Fidelity, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModel:
    """A model to compare plans on.

    Attributes:
        name: As on the command line.
        pipeline: Its pipeline.
        size: `height`, `width` and, of videos, `num_frames`.
        others: Further arguments of a call.
        held_out: Captions to report on.
        seen: Captions for fits and for searches, none of those.
        video: Whether it makes videos.
        shows: Of images and captions, whether each shows all that is asked; None for the
            attributes of the demo's captions.
    """

    name: str
    pipeline: Any
    size: Mapping[str, Any]
    others: Mapping[str, Any]
    held_out: tuple[str, ...]
    seen: tuple[str, ...]
    video: bool = False
    shows: Callable[[Sequence[Pixels], Sequence[str]], Sequence[bool]] | None = None

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
            raise ValueError(f"got {count} prompts; {self.name} has {total} held-out captions")
        return tuple(self.held_out[place * total // count] for place in range(count))

    def compare(self, made: Sequence[Pixels], references: Sequence[Pixels]) -> Compared:
        """Fidelity of images `[H, W, 3]`, or of videos `[F, H, W, 3]`."""
        if not self.video:
            found = fidelity(made, references)
            return Compared(ssim=found.ssim, psnr=found.psnr)
        videos = video_fidelity(made, references)
        means = videos.videos
        return Compared(
            ssim=means.ssim, psnr=means.psnr, flicker=videos.flicker, frames=videos.frames
        )


def image_model(*, quick: bool = False, side: int = 128) -> DemoModel:
    """The embedded FLUX, 128 x 128."""
    side = 64 if quick else side
    return DemoModel(
        name=EMBEDDED,
        pipeline=_pipeline(EMBEDDED),
        size={"height": side, "width": side},
        others={"max_sequence_length": MAX_SEQUENCE_LENGTH},
        held_out=tuple(held_out_prompts()),
        seen=_shuffled([a.caption for a in all_attributes() if not is_held_out(a)]),
    )


def video_model(*, quick: bool = False) -> DemoModel:
    """The embedded Wan, 13 frames of 64 x 64, with guidance."""
    size = {name: VIDEO_CALL[name] for name in ("height", "width", "num_frames")}
    return DemoModel(
        name=EMBEDDED_VIDEO,
        pipeline=_pipeline(EMBEDDED_VIDEO),
        size={**size, "num_frames": 5} if quick else size,
        others={"max_sequence_length": MAX_SEQUENCE_LENGTH, "guidance_scale": _GUIDANCE_SCALE},
        held_out=tuple(held_out_video_prompts()),
        seen=_shuffled([a.caption for a in all_video_attributes() if not is_held_out_video(a)]),
        video=True,
    )


def frame_means(videos: Sequence[Fidelity]) -> list[dict[str, float | None]]:
    """Frame by frame the means over the videos, PSNR over those whose frame differs."""
    frames = zip(*(zip(video.ssim, video.psnr, strict=True) for video in videos), strict=True)
    return [
        {
            "ssim": statistics.fmean(ssim for ssim, _ in frame),
            "psnr": statistics.fmean(found)
            if (found := [psnr for _, psnr in frame if psnr is not None])
            else None,
        }
        for frame in frames
    ]


def _pipeline(name: str) -> Any:
    pipeline = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _shuffled(captions: list[str]) -> tuple[str, ...]:
    random.Random(0).shuffle(captions)  # noqa: S311 - a fixed choice, nothing secret
    return tuple(captions)


MODELS: dict[str, Callable[..., DemoModel]] = {EMBEDDED: image_model, EMBEDDED_VIDEO: video_model}
