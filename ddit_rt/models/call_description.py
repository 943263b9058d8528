"""The other half of a family's description: its pipelines' calls, and their calls of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError
from ddit_rt.models.arguments import call_defaults
from ddit_rt.models.calls import batch_of
from ddit_rt.models.description import Description


class CallDescription(Description):
    """What a call of a pipeline asks for: sizes, and guidance; and which passes come in a call."""

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Height and width, in pixels, of a pipeline call that names none."""
        defaults = call_defaults(pipeline)
        rows, columns = (defaults.get(name) for name in ("height", "width"))
        if rows and columns:
            return int(rows), int(columns)
        size = int(pipeline.default_sample_size * pipeline.vae_scale_factor)
        return size, size

    def default_frames(self, pipeline: Any) -> int | None:
        """Frames of a pipeline call that names none; None for images."""
        del pipeline
        return None

    def call_size(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width, in pixels, that some arguments of a pipeline's call say.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            call: Arguments; where they say nothing, the pipeline's defaults hold.
        """
        rows, columns = self.default_size(pipeline)
        height, width = call.get("height"), call.get("width")
        return rows if height is None else height, columns if width is None else width

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width that the pipeline makes of a call's."""
        return self.call_size(pipeline, call)

    def call_shape(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        """Latent shape of a pipeline's call."""
        size = self.size_of(pipeline, call)
        return self.latent_shape(pipeline, *size, batch_of(call), call.get("num_frames"))

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """Latent shape of an image of `height` x `width` pixels, or of a video.

        Odd sizes round down to whole tokens, as the pipeline does.

        Args:
            pipeline: A pipeline of one of `pipeline_classes`.
            height: Pixel rows.
            width: Pixel columns.
            batch: Samples.
            num_frames: Frames of a video; None for the pipeline's default, and for images.

        Raises:
            ShapeError: A size that the model cannot make.
        """
        if num_frames is not None:
            raise ShapeError(f"got num_frames={num_frames}; {self.name} makes images: leave it out")
        unit = pipeline.vae_scale_factor * self.patch
        if height < unit or width < unit:
            raise ShapeError(
                f"got {height} x {width} pixels; this pipeline's smallest image is {unit} x {unit}"
            )
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, self.patch * (height // unit), self.patch * (width // unit)

    def default_passes(self) -> int:
        """Passes of the model in a step of a pipeline call that says nothing of guidance."""
        return 2 if self.guided_by_default else 1

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """Scale of classifier-free guidance of a pipeline's call; None for a single pass.

        By default a `guidance_scale` above 1 guides, for a negative prompt that is not given is the
        empty one.

        Args:
            pipeline: The pipeline.
            call: All arguments of its call.
        """
        scale = float(call["guidance_scale"])
        return scale if scale > 1 else None

    def scales_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[float, ...]:
        """That of each expert; empty for a single pass."""
        scale = self.scale_of(pipeline, call)
        return () if scale is None else (scale,)

    def ignored(
        self, pipeline: Any, given: Mapping[str, Any], call: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Arguments that the pipeline ignores too, each with what makes it count.

        Args:
            pipeline: The pipeline.
            given: What the caller gave.
            call: All arguments, defaults filled in.
        """
        return ()

    def passes_in(self, given: Mapping[str, Any], batch: int) -> Sequence[Mapping[str, Any]]:
        """The passes that a pipeline's call of its transformer holds, that with the prompt first.

        Args:
            given: Arguments of the transformer's `forward`.
            batch: Samples of the run.
        """
        if not self.negative_first:
            return (given,)
        return [
            {
                name: one[first : first + batch] if isinstance(one, Tensor) else one
                for name, one in given.items()
            }
            for first in reversed(range(0, len(given["hidden_states"]), batch))
        ]

    def as_called(self, velocities: Sequence[Tensor]) -> Any:
        """The inverse of `passes_in`, of what the passes give."""
        return velocities[0] if len(velocities) == 1 else torch.cat([*reversed(velocities)])

    def outputs(
        self, velocities: Sequence[Tensor], sounds: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        """What a pipeline's call of its transformer gives, of what the passes in it give.

        Args:
            velocities: Of each pass, in the pipeline's layout.
            sounds: Of the soundtrack, likewise; None where there is none.
        """
        del sounds
        return (self.as_called(velocities),)
