"""What all pipelines of Wan share: latents, sizes, schedules, guidance, and two experts.

Latents are `[B, 16, F, H/8, W/8]` for 4F - 3 frames, and a token is 2 x 2 latent pixels of one
frame, so a coarse patch is 4 x 4 or 8 x 8 pixels of one frame. Wan 2.2 A14B has two models of one
shape: `transformer` takes the steps whose timestep is at least `boundary_ratio` of the whole range,
and `transformer_2` those after it, with a guidance scale of its own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.arguments import check_steps, default_of
from ddit_rt.models.base import TEXT, Grid
from ddit_rt.models.family import Family

_PATCH = (1, 2, 2)


class WanForwardFamily(Family, ABC):
    """One transformer, or two experts that take turns."""

    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    video: ClassVar[bool] = True
    thousands: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    # 81 frames of 720 x 1280 with guidance; 13824 features per token then stay below 2**31.
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch": (1, 2),
        "image": (4, 75600),
    }
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {"encoder_hidden_states": (TEXT, "text_dim")}
    embeds: ClassVar[Mapping[str, str]] = {"prompt_embeds": "encoder_hidden_states"}
    held: ClassVar[tuple[str, ...]] = (
        "rope",
        "condition_embedder.text_embedder",
        "condition_embedder.image_embedder",
    )
    timed: ClassVar[tuple[str, ...]] = ("condition_embedder.time_embedder",)

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses what this version cannot run, by name."""
        refused = self.refused(transformer.config)
        if (patch := tuple(transformer.config.patch_size)) != _PATCH:
            refused.append(f"patch_size={patch} (expected {_PATCH})")
        if pipeline is not None:
            refused += _refused_experts(transformer, pipeline)
        if refused:
            raise UnsupportedModelError(
                f"this version runs no {self.pipeline_classes[0]} of a model with "
                f"{'; '.join(refused)}; call the diffusers pipeline itself"
            )

    @abstractmethod
    def refused(self, config: Any) -> list[str]:
        """What a transformer has that this family cannot run, each in a few words."""

    def experts(self, pipeline: Any) -> tuple[nn.Module, ...]:
        """`transformer_2`, where the pipeline uses it."""
        return () if pipeline.config.boundary_ratio is None else (pipeline.transformer_2,)

    def expert_steps(self, pipeline: Any, scheduler: Any) -> tuple[int, ...]:
        """See `Family.expert_steps`; split as `WanPipeline.__call__` does."""
        if pipeline is None or pipeline.config.boundary_ratio is None:
            return super().expert_steps(pipeline, scheduler)
        boundary = pipeline.config.boundary_ratio * scheduler.config.num_train_timesteps
        return tuple(map(int, (scheduler.timesteps < boundary).tolist()))

    def latent_channels(self, transformer: Any) -> int:
        """Those that carry noise."""
        config = transformer.config
        return int(config.out_channels or config.in_channels)

    def scales_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[float, ...]:
        """See `Family.scales_of`: by default the second expert's is the first's."""
        scales = super().scales_of(pipeline, call)
        if not scales or pipeline.config.boundary_ratio is None:
            return scales
        second = call["guidance_scale_2"]
        return (*scales, scales[0] if second is None else float(second))

    def ignored(
        self, pipeline: Any, given: Mapping[str, Any], call: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """See `Family.ignored`."""
        first, second = call["guidance_scale"], call["guidance_scale_2"]
        if first > 1 or second is None or second <= 1:
            return ()
        off = f"guidance_scale={first:g}, which turns guidance off for both experts"
        return (f"guidance_scale_2={second:g} is ignored at {off}",)

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `Family.set_timesteps`. Wan shifts by a constant of the scheduler's own."""
        check_steps(scheduler, num_inference_steps)
        if sigmas is None:
            scheduler.set_timesteps(num_inference_steps)
        elif "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=np.asarray(sigmas))  # UniPC takes no list
        else:
            raise ValueError(
                f"got `sigmas`, which {type(scheduler).__name__} does not take; leave them out"
            )

    def default_frames(self, pipeline: Any) -> int | None:
        """81, as the pipeline's call has it."""
        return default_of(pipeline, "num_frames")

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`. Sizes are not rounded: a warning is easily missed."""
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, *_latent_size(pipeline, height, width, num_frames)


def _latent_size(
    pipeline: Any, height: int, width: int, num_frames: int | None
) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a video.

    Raises:
        ShapeError: The VAE and the patches cannot make this size; the message names some that
            they can.
    """
    if num_frames is None:
        num_frames = default_of(pipeline, "num_frames")
    edge, step = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    unit = edge * _PATCH[-1]
    if height < unit or width < unit or height % unit or width % unit:
        raise ShapeError(
            f"got {height} x {width} pixels; height and width must be multiples of {unit}, such as "
            f"{_nearest(height, unit)} x {_nearest(width, unit)}"
        )
    if num_frames < 1 or (num_frames - 1) % step:
        fewer = max(num_frames - 1, 0) // step * step + 1
        raise ShapeError(
            f"got num_frames={num_frames}; it must be a multiple of {step} plus 1, such as {fewer} "
            f"or {fewer + step}"
        )
    return (num_frames - 1) // step + 1, height // edge, width // edge


def _nearest(size: int, unit: int) -> int:
    return max(round(size / unit), 1) * unit


def _refused_experts(transformer: Any, pipeline: Any) -> list[str]:
    """What keeps a pipeline's `transformer_2` from running on what was compiled for the first."""
    if pipeline.config.boundary_ratio is None:
        return []
    second = pipeline.transformer_2
    if second is None:
        return ["boundary_ratio without a transformer_2"]
    differs = sorted(
        name
        for name in {*transformer.config, *second.config}
        if not name.startswith("_") and transformer.config.get(name) != second.config.get(name)
    )
    if differs:
        return [f"a transformer_2 of another configuration ({', '.join(differs)})"]
    weights = [one.patch_embedding.weight for one in (transformer, second)]
    if weights[0].dtype != weights[1].dtype or weights[0].device != weights[1].device:
        first, other = (f"{weight.dtype} on {weight.device}" for weight in weights)
        return [f"a transformer_2 of {other} beside a transformer of {first}"]
    return []
