"""LongCat-AudioDiT: `LongCatAudioDiTTransformer` behind `LongCatAudioDiTPipeline`.

The pipeline's latents are `[B, T, C]`, of time alone; here they are `[B, C, 1, T]`, so that a patch
of s frames is a stretch of time, and a coarse step sees a recording of as many frames fewer, whose
noise level is that of one axis, r = sqrt(1 / s).

The pipeline's times, and its scheduler's levels, run from 0 at noise to 1, and the model gives the
velocity towards the recording: all of these are turned round. The recordings of a call are of one
length, so that the forward's mask of frames masks none, and is left out; its latent condition is
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddit_rt import checks
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import TEXT, Grid
from ddit_rt.models.calls import PipelineCall, check_shape
from ddit_rt.models.family import Family

_MASK = "encoder_attention_mask"


class LongCatAudioFamily(Family):
    """LongCat-AudioDiT, text to audio."""

    name: ClassVar[str] = "longcat-audio"
    transformer_class: ClassVar[str] = "LongCatAudioDiTTransformer"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("LongCatAudioDiTPipeline",)
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "dit_text_dim"),
        _MASK: (TEXT,),
    }
    audio: ClassVar[bool] = True
    size_names: ClassVar[tuple[str, ...]] = ("audio_duration_s",)
    packed: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    patch: ClassVar[int] = 1
    held: ClassVar[tuple[str, ...]] = (
        "text_embed",
        "text_conv_layer",
        "latent_embed",
        "rotary_embed",
    )
    timed: ClassVar[tuple[str, ...]] = ("time_embed",)
    sized: ClassVar[tuple[str, ...]] = ("attention_mask", "latent_cond")
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {_MASK: torch.bool}

    def latent_channels(self, transformer: Any) -> int:
        """See `Family.latent_channels`."""
        return int(transformer.config.latent_dim)

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """See `Family.default_size`: the longest recording, as the pipeline guesses a length."""
        return 1, int(pipeline.max_wav_duration * pipeline.sample_rate)

    def call_size(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family.call_size`: as the pipeline counts latent frames, in samples."""
        unit, (_, longest) = pipeline.vae_scale_factor, self.default_size(pipeline)
        latents, seconds = call.get("latents"), call.get("audio_duration_s")
        if latents is not None:
            channels = self.latent_channels(pipeline.transformer)
            check_shape("latents", latents, ("prompts", "frames", channels))
            return 1, latents.shape[1] * unit
        if seconds is None and call.get("prompt") is not None:
            seconds = _guessed_seconds(call["prompt"])
        if seconds is not None:
            samples = checks.number("audio_duration_s", seconds, 0) * pipeline.sample_rate
            longest = min(int(samples), longest)
        return 1, max(1, longest // unit) * unit

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`: `width` in samples."""
        frames = width // pipeline.vae_scale_factor
        return batch, self.latent_channels(pipeline.transformer), 1, frames

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`."""
        given = super().forward_arguments(latents, level, arguments)
        return {**given, "latent_cond": torch.zeros_like(given["hidden_states"])}

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Family.time`: 0 at noise."""
        return (1 - level).to(dtype)

    def level_of(self, timestep: Tensor) -> Tensor:
        """See `Family.level_of`."""
        return 1 - timestep.float()

    def read_output(self, given: Any) -> Tensor:
        """See `Family.read_output`."""
        return -super().read_output(given)

    def as_called(self, velocities: Sequence[Tensor]) -> Tensor:
        """See `Family.as_called`."""
        (velocity,) = velocities
        return -velocity

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`."""
        if not scheduler.config.get("invert_sigmas", False):
            raise UnsupportedModelError(
                f"got a {type(scheduler).__name__} without invert_sigmas=True, by which the "
                "pipeline gives its model times that rise from noise; set it"
            )
        return super().read_call(pipeline, scheduler, arguments)

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `Family.set_timesteps`: with levels that fall; see `solver.falling`."""
        scheduler.register_to_config(invert_sigmas=False)
        super().set_timesteps(scheduler, num_inference_steps, sigmas, grid)


def _guessed_seconds(prompt: str | list[str]) -> float:
    """Length that the pipeline guesses from the texts of a call."""
    from diffusers.pipelines.longcat_audio_dit import pipeline_longcat_audio_dit as pipelines

    texts = [prompt] if isinstance(prompt, str) else prompt
    plain = [pipelines._normalize_text(text) for text in texts]
    return float(pipelines._approx_duration_from_text(plain))
