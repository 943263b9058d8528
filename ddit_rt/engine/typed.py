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

    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable[..., Any] | None
    callback_on_step_end_tensor_inputs: list[str]
    generator: Generator | list[Generator] | None
    guidance_scale: float
    guidance_scale_2: float | None
    height: int | None
    image: Any
    ip_adapter_image: Any
    ip_adapter_image_embeds: list[Tensor] | None
    joint_attention_kwargs: dict[str, Any] | None
    latents: Tensor | None
    mask_image: Any
    masked_image_latents: Tensor | None
    max_area: int
    max_sequence_length: int
    negative_ip_adapter_image: Any
    negative_ip_adapter_image_embeds: list[Tensor] | None
    negative_pooled_prompt_embeds: Tensor | None
    negative_prompt: str | list[str] | None
    negative_prompt_2: str | list[str] | None
    negative_prompt_embeds: Tensor | None
    num_frames: int
    num_images_per_prompt: int | None
    num_inference_steps: int
    num_videos_per_prompt: int | None
    output_type: str | None
    pooled_prompt_embeds: Tensor | None
    prompt_2: str | list[str] | None
    prompt_embeds: Tensor | None
    padding_mask_crop: int | None
    return_dict: bool
    sigmas: Sequence[float] | None
    strength: float
    true_cfg_scale: float
    width: int | None


class PipelineOutput(Protocol):
    """What the pipeline returns; with `return_dict=False` it is a tuple instead.

    Attributes:
        images: Of an image pipeline: a list of `PIL.Image`, or as `output_type` says.
        frames: Of a video pipeline: per video its frames, or as `output_type` says.
    """

    images: Any
    frames: Any
