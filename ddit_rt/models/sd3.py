"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` behind `StableDiffusion3Pipeline`.

Latents are `[B, 16, H/8, W/8]`; the model itself cuts patches of 2 x 2 latent pixels. It crops its
positions from the centre of a table. So a coarse step's small image has those of a real one of
that size, and no image may be larger than the table. Both passes of guidance are one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ddit_rt.errors import ShapeError
from ddit_rt.models.arguments import check_steps
from ddit_rt.models.base import TEXT, Grid
from ddit_rt.models.family import Family


class SD3Family(Family):
    """Stable Diffusion 3 and 3.5, text to image."""

    name: ClassVar[str] = "sd3"
    transformer_class: ClassVar[str] = "SD3Transformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "joint_attention_dim"),
        "pooled_projections": ("pooled_projection_dim",),
    }
    thousands: ClassVar[bool] = True
    negative_first: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("context_embedder",)
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed",)
    repeated: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)

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
