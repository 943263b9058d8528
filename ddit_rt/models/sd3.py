"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` behind `StableDiffusion3Pipeline`.

Latents are `[B, 16, H/8, W/8]`; the model itself cuts patches of 2 x 2 latent pixels. It crops its
positions from the centre of a table. So a coarse step's small image has those of a real one of
that size, and no image may be larger than the table. Both passes of guidance are one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.arguments import check_steps
from ddit_rt.models.base import Grid
from ddit_rt.models.calls import PipelineCall
from ddit_rt.models.family import Family


class SD3Family(Family):
    """Stable Diffusion 3 and 3.5, text to image."""

    name: ClassVar[str] = "sd3"
    transformer_class: ClassVar[str] = "SD3Transformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    conditioning_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "pooled_projections")
    guided_by_default: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("context_embedder",)
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed",)
    repeated: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)

    def latent_channels(self, transformer: Any) -> int:
        """`in_channels`."""
        return int(transformer.config.in_channels)

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`: at most as large as the table of positions."""
        shape = super().latent_shape(pipeline, height, width, batch, num_frames)
        unit = self.patch * pipeline.vae_scale_factor
        most = pipeline.transformer.config.pos_embed_max_size * unit
        if max(height, width) > most:
            raise ShapeError(f"got {height} x {width} pixels; the model's positions end at {most}")
        return shape

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `Family.example`."""
        config, dtype = transformer.config, transformer.dtype
        width, pooled = config.joint_attention_dim, config.pooled_projection_dim
        return {
            "encoder_hidden_states": torch.empty(batch, text, width, dtype=dtype, device="meta"),
            "pooled_projections": torch.empty(batch, pooled, dtype=dtype, device="meta"),
        }

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `Family.resized`: the model reads the size off its latents."""
        return {}

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Family.time`: 1000 t, which the pipeline leaves in float32."""
        return level * 1000

    def level_of(self, timestep: Tensor) -> Tensor:
        """See `Family.level_of`."""
        return timestep.float() / 1000

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`: a negative prompt that is not given is the empty one."""
        scale = float(call["guidance_scale"])
        return scale if scale > 1 else None

    def passes_in(self, given: Mapping[str, Any], batch: int) -> list[Mapping[str, Any]]:
        """See `Family.passes_in`: the pass with the prompt is the last of the call."""
        return [
            {
                name: one[first : first + batch] if isinstance(one, Tensor) else one
                for name, one in given.items()
            }
            for first in reversed(range(0, len(given["hidden_states"]), batch))
        ]

    def as_called(self, velocities: Sequence[Tensor]) -> Tensor:
        """See `Family.as_called`."""
        return torch.cat(tuple(reversed(velocities)))

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `Family.set_timesteps`: by default at the scheduler's own noise levels."""
        if sigmas is not None:
            super().set_timesteps(scheduler, num_inference_steps, sigmas, grid)
            return
        check_steps(scheduler, num_inference_steps)
        shifts = scheduler.config.get("use_dynamic_shifting", False)
        more = {"mu": self.mu(scheduler, grid.tokens, num_inference_steps)} if shifts else {}
        scheduler.set_timesteps(num_inference_steps, **more)

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`."""
        for name in ("skip_guidance_layers", "mu"):
            if arguments.get(name) is not None:
                raise UnsupportedModelError(
                    f"got `{name}`, which the compiled loop would ignore; leave it out, or call "
                    "the diffusers pipeline itself"
                )
        return super().read_call(pipeline, scheduler, arguments)

    def pack_latents(self, latents: Tensor) -> Tensor:
        """As they are."""
        return latents

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As they are."""
        return latents
