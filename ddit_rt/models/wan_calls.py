"""Calls of Wan's pipelines around their denoising loops: sizes, prompts, decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.arguments import (
    call_defaults,
    check_exclusive,
    check_given_embeds,
    check_output,
)
from ddit_rt.models.base import Family
from ddit_rt.models.calls import PipelineCall, batch_of
from ddit_rt.torch_state import callers_modes

NEGATIVE = "negative_encoder_hidden_states"
"""Conditioning of the second pass."""

EMBEDDED_TEXT = 512
"""Text tokens that the attention of a model with image embeddings takes for granted."""

_PATCH = 2


def default_of(pipeline: Any, name: str) -> int:
    """What the pipeline's call takes for a size that is not given."""
    return int(call_defaults(pipeline)[name])


def latent_size(
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
    unit = edge * _PATCH
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


class WanSizes(Family):
    """Sizes as every one of Wan's pipelines has them."""

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """480 x 832, as the pipeline's call has it."""
        return default_of(pipeline, "height"), default_of(pipeline, "width")

    def default_frames(self, pipeline: Any) -> int | None:
        """81, as the pipeline's call has it."""
        return default_of(pipeline, "num_frames")

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`. Sizes are not rounded: a warning is easily missed."""
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, *latent_size(pipeline, height, width, num_frames)


def _nearest(size: int, unit: int) -> int:
    return max(round(size / unit), 1) * unit


def checked_batch(pipeline: Any, call: Mapping[str, Any]) -> int:
    """Videos of the call, after the pipeline's own checks but that of the size, which is ours."""
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    check_exclusive(call, ("prompt", embeds[0]), ("negative_prompt", embeds[1]))
    names = (
        *embeds,
        "callback_on_step_end_tensor_inputs",
        "guidance_scale_2",
    )
    pipeline.check_inputs(
        call["prompt"], call["negative_prompt"], 16, 16, **{name: call[name] for name in names}
    )
    batch = batch_of(call)
    for name in embeds:
        shape = ("text tokens", pipeline.transformer.config.text_dim)
        check_given_embeds(name, call[name], shape, batch, "num_videos_per_prompt")
    check_output(pipeline, call)
    return batch


def ignored_arguments(call: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments that the pipeline ignores too, each with what makes it count."""
    first, second = call["guidance_scale"], call["guidance_scale_2"]
    if first > 1 or second is None or second <= 1:
        return ()
    off = f"guidance_scale={first:g}, which turns guidance off for both experts"
    return (f"guidance_scale_2={second:g} is ignored at {off}",)


def scales_of_call(pipeline: Any, call: Mapping[str, Any]) -> tuple[float, ...]:
    """Guidance scale of each expert; empty where the call asks for none."""
    if call["guidance_scale"] <= 1:
        return ()
    second = second_scale(pipeline, call)
    scale = float(call["guidance_scale"])
    return (scale,) if second is None else (scale, second)


def second_scale(pipeline: Any, call: Mapping[str, Any]) -> float | None:
    """Guidance scale of the second expert, by default the first's; None where there is none."""
    if pipeline.config.boundary_ratio is None:
        return None
    second = call["guidance_scale_2"]
    return float(call["guidance_scale"] if second is None else second)


def encode_prompts(pipeline: Any, checked: PipelineCall, device: torch.device) -> dict[str, Tensor]:
    """Prompts as conditioning, with the negative prompts where guidance is asked for."""
    call, batch, guided = checked.arguments, checked.shape[0], checked.guided
    with callers_modes():
        embeds, negative = pipeline.encode_prompt(
            prompt=call["prompt"],
            negative_prompt=call["negative_prompt"],
            do_classifier_free_guidance=guided,
            num_videos_per_prompt=call["num_videos_per_prompt"],
            prompt_embeds=call["prompt_embeds"],
            negative_prompt_embeds=call["negative_prompt_embeds"],
            max_sequence_length=call["max_sequence_length"],
            device=device,
        )
    dtype = pipeline.transformer.patch_embedding.weight.dtype

    def repeated(text: Tensor) -> Tensor:
        # Given embeddings are not repeated for `num_videos_per_prompt`; one serves all.
        return (
            text.to(device, dtype).expand(batch, -1, -1)
            if text.shape[0] == 1
            else text.to(device, dtype)
        )

    conditioning = {"encoder_hidden_states": repeated(embeds)}
    if guided:
        conditioning[NEGATIVE] = repeated(negative)
        scales = torch.tensor(checked.scales, dtype=torch.float32, device=device)
        conditioning["guidance_scale"] = scales if len(scales) > 1 else scales[0]
    return conditioning


def finish(pipeline: Any, latents: Tensor, call: Mapping[str, Any]) -> Any:
    """Decodes as the pipeline does: `[B, C, F, H, W]` to its output object."""
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

    pipeline._current_timestep = None
    video: Any = latents
    if call["output_type"] != "latent":
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        with callers_modes():
            decoded = vae.decode(latents * std + mean, return_dict=False)[0]
            video = pipeline.video_processor.postprocess_video(
                decoded, output_type=call["output_type"]
            )
    pipeline.maybe_free_model_hooks()
    return WanPipelineOutput(frames=video) if call["return_dict"] else (video,)


def check_text(call: Mapping[str, Any], *, guided: bool) -> None:
    """Refuses prompts of other lengths than the attention takes for granted."""
    embeds = [call["prompt_embeds"], *([call["negative_prompt_embeds"]] if guided else [])]
    lengths = {call["max_sequence_length"] if one is None else one.shape[1] for one in embeds}
    if lengths != {EMBEDDED_TEXT}:
        raise UnsupportedModelError(
            f"got prompts of {sorted(lengths)} tokens (max_sequence_length, or the embeddings' own "
            f"length); the attention of a model with image embeddings takes {EMBEDDED_TEXT} for "
            "granted: leave max_sequence_length out, and pad embeddings with zeros"
        )


def check_pictures(call: Mapping[str, Any], expected: int) -> None:
    """Refuses another number of pictures than the model has image embeddings of."""
    given = 1 + (call["last_image"] is not None)
    if call["image_embeds"] is None and given != expected:
        raise ValueError(
            f"got {given} picture(s) for a model with image embeddings of {expected}; "
            + ("give `last_image` too" if expected > given else "leave `last_image` out")
        )
