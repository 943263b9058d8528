"""Types of an engine's call, for editors and type checkers; nothing runs by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict

from torch import Generator, Tensor


class CallArguments(TypedDict, total=False):
    """Arguments that pass through to the pipeline's `__call__`; each pipeline takes some of them.

    `latents` are in the pipeline's own layout: for FLUX packed, `[B, H/2 * W/2, 4 C]`; for Wan
    `[B, C, F, H, W]`. (`Engine.denoise` takes `[B, C, H, W]` of every image model.)
    """

    _auto_resize: bool
    attention_kwargs: dict[str, Any] | None
    audio_duration_s: float | None
    audio_guidance_rescale: float | None
    audio_guidance_scale: float | None
    audio_latents: Tensor | None
    audio_modality_scale: float | None
    audio_stg_scale: float | None
    callback_on_step_end: Callable[..., Any] | None
    callback_on_step_end_tensor_inputs: list[str]
    caption_upsample_temperature: float
    cfg_normalization: bool
    cfg_truncation: float
    clip_skip: int | None
    conditioning_scale: float | list[float] | Tensor
    decode_noise_scale: float | list[float] | None
    decode_timestep: float | list[float]
    enable_prompt_enhancement: bool
    frame_rate: float
    generator: Generator | list[Generator] | None
    guidance_rescale: float
    guidance_scale: float
    guidance_scale_2: float | None
    height: int | None
    image: Any
    image_embeds: Tensor | None
    ip_adapter_image: Any
    ip_adapter_image_embeds: list[Tensor] | None
    joint_attention_kwargs: dict[str, Any] | None
    last_image: Any
    latents: Tensor | None
    mask: Any
    mask_image: Any
    masked_image_latents: Tensor | None
    max_area: int
    max_seconds: float
    max_sequence_length: int
    min_seconds: float
    modality_scale: float
    motion_speed: float
    mu: float | None
    negative_ip_adapter_image: Any
    negative_ip_adapter_image_embeds: list[Tensor] | None
    negative_pooled_prompt_embeds: Tensor | None
    negative_prompt: str | list[str] | None
    negative_prompt_2: str | list[str] | None
    negative_prompt_3: str | list[str] | None
    negative_prompt_attention_mask: Tensor | None
    negative_prompt_embeds: Tensor | None
    negative_prompt_embeds_mask: Tensor | None
    noise_scale: float
    num_frames: int
    num_images_per_prompt: int | None
    num_inference_steps: int
    num_videos_per_prompt: int | None
    output_type: str | None
    padding_mask_crop: int | None
    pooled_prompt_embeds: Tensor | None
    prompt_2: str | list[str] | None
    prompt_3: str | list[str] | None
    prompt_attention_mask: Tensor | None
    prompt_embeds: Tensor | None
    prompt_embeds_mask: Tensor | None
    prompt_enhancement_kwargs: dict[str, Any] | None
    prompt_enhancement_seed: int
    prompt_max_new_tokens: int | None
    reference_images: Any
    return_dict: bool
    sigmas: Sequence[float] | None
    skip_guidance_layers: list[int] | None
    skip_layer_guidance_scale: float
    skip_layer_guidance_start: float
    skip_layer_guidance_stop: float
    spatio_temporal_guidance_blocks: list[int] | None
    stg_scale: float
    strength: float
    system_prompt: str | None
    text_encoder_out_layers: tuple[int, ...]
    timesteps: list[int] | None
    true_cfg_scale: float
    use_cross_timestep: bool
    video: Any
    width: int | None


class PipelineOutput(Protocol):
    """What the pipeline returns; with `return_dict=False` it is a tuple instead.

    Attributes:
        images: What an image pipeline makes: a list of `PIL.Image`, or as `output_type` says.
        frames: What a video pipeline makes: the frames of each video, or as `output_type` says.
        audios: What an audio pipeline makes: `[B, 1, samples]`, as `output_type` says.
    """

    images: Any
    frames: Any
    audios: Any
