"""LTX-2: `LTX2VideoTransformer3DModel` behind `LTX2Pipeline`, video with its soundtrack.

Video latents are `[B, 128, F, H/32, W/32]`, a token for each latent pixel. They and the audio's
advance together, each through blocks that attend to the other. Coarse steps make the video small;
the soundtrack keeps its length and its own time: the forward takes a time for each. It comes and
goes with every call of the transformer, and the pipeline's own loop steps both.

The pipeline runs negative prompt and prompt in one call, and may then run the prompt with the
attention of some blocks passed by (`stg_scale`), and with the two latents apart (`modality_scale`):
blocks are packages of their own there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt import checks
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.calls import ModelCall, PipelineCall
from ddit_rt.models.family import Family

_SIZE = "video_size"
"""Conditioning: latent frames, rows and columns that `video_coords` are of."""

_FRAMES_PER_SECOND = 24
_FRAMES = 121


class LTX2Family(Family):
    """LTX-2, text to video with sound."""

    name: ClassVar[str] = "ltx2"
    transformer_class: ClassVar[str] = "LTX2VideoTransformer3DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("LTX2Pipeline",)
    video: ClassVar[bool] = True
    soundtrack: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    own_loop: ClassVar[str] = "a soundtrack advances with the video, and a table steps one latent"
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {
        "image": (4, 65536),
        "text": (1, 1024),
    }
    patch: ClassVar[int] = 1
    packed: ClassVar[bool] = True
    thousands: ClassVar[bool] = True
    negative_first: ClassVar[bool] = True
    shifts: ClassVar[tuple[float, float, float, float]] = (1024, 4096, 0.95, 2.05)
    held: ClassVar[tuple[str, ...]] = (
        *("caption_projection", "audio_caption_projection", "rope", "audio_rope"),
        *("cross_attn_rope", "cross_attn_audio_rope"),
    )
    sized: ClassVar[tuple[str, ...]] = ("sigma", "num_frames", "height", "width")
    exact: ClassVar[tuple[str, ...]] = (
        *("video_coords", "audio_coords", "audio_timestep", "audio_sigma"),
    )
    variants: ClassVar[int] = 3

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """See `Family.check_model`."""
        config = transformer.config
        patches = [config[name] for name in ("patch_size", "patch_size_t")]
        if patches != [1, 1] or pipeline is None:
            raise UnsupportedModelError(
                f"got an LTX-2 transformer with patch_size, patch_size_t = {patches}"
                f"{' without its pipeline' if pipeline is None else ''}; expected 1, 1 in an "
                "LTX2Pipeline, whose own loop steps its two latents"
            )

    def default_passes(self) -> int:
        """See `Family.default_passes`: guidance of three kinds, and the prompt alone."""
        return 4

    def default_frames(self, pipeline: Any) -> int | None:
        """121, as the pipeline has it where nothing predicts a duration."""
        return _FRAMES

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`; the pipeline itself refuses sizes that 32 does not divide."""
        edge = pipeline.vae_spatial_compression_ratio
        frames = ((num_frames or _FRAMES) - 1) // pipeline.vae_temporal_compression_ratio + 1
        if min(height, width) < edge:
            raise ShapeError(
                f"got {height} x {width} pixels; the smallest video is {edge} x {edge}"
            )
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, frames, height // edge, width // edge

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`."""
        widths = [transformer.config.caption_channels] * 2
        if not transformer.config.use_prompt_embeddings:
            widths = [module.out_features for module in _inputs(transformer)]
        kinds = dict(zip(("", "audio_"), widths, strict=True))
        return {
            **{f"{one}encoder_hidden_states": (batch, text, width) for one, width in kinds.items()},
            **{f"{one}encoder_attention_mask": (batch, text) for one in kinds},
        }

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `Family.example`: plain, with the latents apart, without attention."""
        given = super().example(transformer, variant, batch, text)
        perturbed = {"spatio_temporal_guidance_blocks": [0]} if variant == 2 else {}
        return {**given, "isolate_modalities": variant == 1, **perturbed}

    def sound_example(self, transformer: Any, batch: int, tokens: int) -> dict[str, Any]:
        """See `Family.sound_example`."""
        shape = (batch, tokens, transformer.config.audio_in_channels)
        time = torch.empty(batch, dtype=torch.float32, device="meta")
        return {
            "audio_hidden_states": torch.empty(shape, dtype=transformer.dtype, device="meta"),
            "audio_num_frames": tokens,
            "audio_timestep": time,
            "audio_sigma": time,
        }

    def sound_tokens(self, transformer: Any, frames: int) -> int:
        """See `Family.sound_tokens`."""
        config = transformer.config
        rate = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
        seconds = ((frames - 1) * config.vae_scale_factors[0] + 1) / _FRAMES_PER_SECOND
        tokens: int = round(seconds * rate)
        return tokens

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`: a small video's positions are the first ones."""
        prompt = dict(arguments)
        frames, rows, columns = latents.shape[2:]
        if (size := prompt.pop(_SIZE, None)) is not None:
            coords = prompt["video_coords"].unflatten(2, size)
            prompt["video_coords"] = coords[:, :, :, :rows, :columns].flatten(2, 4)
        given = super().forward_arguments(latents, level, prompt)
        sizes = {"num_frames": frames, "height": rows, "width": columns}
        return {**given, **sizes, "sigma": given["timestep"]}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`."""
        scale = float(call["guidance_scale"])
        return scale if max(scale, _sound_of(call, "guidance_scale")) > 1 else None

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`."""
        call = super().read_call(pipeline, scheduler, arguments)
        given = call.arguments
        if given["timesteps"] is not None:
            raise UnsupportedModelError("got timesteps, which would be ignored; pass sigmas")
        if given["num_frames"] is None and getattr(pipeline, "duration_head", None) is not None:
            raise UnsupportedModelError(
                "got no num_frames for a pipeline that predicts them from the prompt, after sizes "
                "must be known; pass num_frames"
            )
        apart = max(given["modality_scale"], _sound_of(given, "modality_scale")) > 1
        perturbed = max(given["stg_scale"], _sound_of(given, "stg_scale")) > 0
        return replace(call, passes=call.passes + apart + perturbed)

    def check_conditioning(
        self, transformer: nn.Module, batch: int, conditioning: Mapping[str, Any]
    ) -> None:
        """See `Family.check_conditioning`."""
        raise UnsupportedModelError(
            "engine.denoise steps one latent, and LTX-2 has two; call the engine itself"
        )

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`."""
        time = arguments["timestep"]
        sound = {"audio_timestep": time, "audio_sigma": time}
        call = super().read_model_call(transformer, shape, {**arguments, **sound})
        call.conditioning[_SIZE] = tuple(shape[2:])
        return call

    def outputs(
        self, velocities: Sequence[Tensor], sounds: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        """See `Family.outputs`."""
        known = [sound for sound in sounds if sound is not None]
        return self.as_called(velocities), self.as_called(known)

    def block_call(self, given: dict[str, Any]) -> dict[str, Any]:
        """See `Family.block_call`: all samples of a pass are perturbed, or none.

        The forward says so by a tensor on the host, beside a mask that nothing reads then.
        """
        perturbed = bool(given.get("all_perturbed"))
        return {**given, "all_perturbed": perturbed, "perturbation_mask": None}

    def read_sound(self, given: Any) -> Tensor | None:
        """See `Family.read_sound`."""
        sound: Tensor = given[1]
        return sound

    def no_output(self, given: Mapping[str, Any]) -> Any:
        """See `Family.no_output`."""
        return tuple(torch.zeros_like(given[f"{one}hidden_states"]) for one in ("", "audio_"))

    def given_latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.given_latents`: not packed."""
        return shape


def _inputs(transformer: Any) -> tuple[nn.Linear, nn.Linear]:
    return transformer.proj_in, transformer.audio_proj_in


def _sound_of(call: Mapping[str, Any], name: str) -> float:
    """The soundtrack's scale of a kind of guidance; the video's where it has none."""
    given = call[f"audio_{name}"]
    own = None if given is None else checks.number(f"audio_{name}", given)
    return own or float(call[name])
