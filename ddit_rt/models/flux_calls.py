"""`FluxPipeline.__call__` around its denoising loop: checks, prompts, decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.models.arguments import (
    check_counts,
    check_exclusive,
    check_given_embeds,
    check_output,
    is_empty,
)
from ddit_rt.models.calls import PipelineCall, batch_of, prompts_of
from ddit_rt.torch_state import callers_modes

PATCH = 2
"""Side of the square of latent pixels that the pipeline packs into a token."""

NEGATIVES = {
    "encoder_hidden_states": "negative_encoder_hidden_states",
    "pooled_projections": "negative_pooled_projections",
}
"""Conditioning of the second pass, by that of the first."""


_PROMPTS = ("prompt", "prompt_2")
_EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")


def wants_true_cfg(call: Mapping[str, Any]) -> bool:
    """Whether a FLUX call asks for a second pass with a negative prompt, as the pipeline has it.

    Raises:
        ValueError: A `true_cfg_scale` without a negative prompt would be ignored.
    """
    if call["true_cfg_scale"] <= 1:
        return False
    embeds = (call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"])
    if call["negative_prompt"] is None and any(tensor is None for tensor in embeds):
        raise ValueError(
            f"got true_cfg_scale={call['true_cfg_scale']} without a negative prompt, which would "
            "be ignored; pass negative_prompt, or leave true_cfg_scale at 1"
        )
    return True


def ignored_arguments(given: Mapping[str, Any], *, distilled: bool) -> tuple[str, ...]:
    """Arguments that the pipeline ignores too, each with what makes it count.

    Args:
        given: What the caller gave.
        distilled: Whether the model takes `guidance_scale`.
    """
    notes = []
    # A callback may read it.
    unread = given.get("callback_on_step_end") is None
    if not distilled and unread and given.get("guidance_scale"):
        notes.append(
            f"guidance_scale={given['guidance_scale']:g} is ignored: this model was made without "
            "guidance embeddings (guidance_embeds=False)"
        )
    if "true_cfg_scale" not in given:  # at 1 or below, the caller has turned it off
        notes += [
            f"{name} is ignored without a true_cfg_scale above 1"
            for name in (f"negative_{name}" for name in (*_PROMPTS, *_EMBEDS))
            if not is_empty(given.get(name))
        ]
    return tuple(notes)


def check_inputs(pipeline: Any, call: Mapping[str, Any]) -> None:
    """The own checks of a FLUX pipeline, and those of what it would take and fail at."""
    for prefix in ("", "negative_"):
        given = f"{prefix}{_EMBEDS[0]}"
        check_exclusive(call, *((f"{prefix}{name}", given) for name in _PROMPTS))
    names = (
        "negative_prompt",
        "negative_prompt_2",
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "callback_on_step_end_tensor_inputs",
        "max_sequence_length",
    )
    pipeline.check_inputs(
        call["prompt"],
        call["prompt_2"],
        call["height"],
        call["width"],
        **{name: call[name] for name in names},
    )
    config, batch = pipeline.transformer.config, batch_of(call)
    for prefix in ("", "negative_"):
        for name, shape in (
            ("prompt_embeds", ("text tokens", config.joint_attention_dim)),
            ("pooled_prompt_embeds", (config.pooled_projection_dim,)),
        ):
            given = call[f"{prefix}{name}"]
            check_given_embeds(f"{prefix}{name}", given, shape, batch, "num_images_per_prompt")
    texts = ("prompt_2", "negative_prompt", "negative_prompt_2")
    check_counts(call, texts, prompts_of(call))
    check_output(pipeline, call)


def encode_prompts(pipeline: Any, checked: PipelineCall) -> dict[str, Tensor]:
    """Prompts as conditioning, with the negative ones where true guidance is asked for."""
    call, batch, guided = checked.arguments, checked.shape[0], checked.guided
    conditioning: dict[str, Tensor] = {}
    for prefix in ("", "negative_") if guided else ("",):
        with callers_modes():
            embeds, pooled, _ = pipeline.encode_prompt(
                **{name: call[f"{prefix}{name}"] for name in (*_PROMPTS, *_EMBEDS)},
                device=pipeline._execution_device,
                num_images_per_prompt=call["num_images_per_prompt"],
                max_sequence_length=call["max_sequence_length"],
            )
        if embeds.shape[0] == 1:
            # Given embeddings are not repeated for `num_images_per_prompt`; diffusers broadcasts.
            embeds, pooled = embeds.expand(batch, -1, -1), pooled.expand(batch, -1)
        conditioning[f"{prefix}encoder_hidden_states"] = embeds
        conditioning[f"{prefix}pooled_projections"] = pooled
    if guided:
        conditioning["true_cfg_scale"] = torch.tensor(
            checked.scales[0], dtype=torch.float32, device=pipeline._execution_device
        )
    return conditioning


def finish(pipeline: Any, latents: Tensor, call: Mapping[str, Any]) -> Any:
    """Decodes as the pipeline does: `[B, C, H, W]` to its output object."""
    from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput

    pipeline._current_timestep = None
    if call["output_type"] == "latent":
        images: Any = ops.pack(latents, PATCH)
    else:
        config = pipeline.vae.config
        scaled = latents.to(pipeline.vae.dtype) / config.scaling_factor + config.shift_factor
        with callers_modes():
            decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
            images = pipeline.image_processor.postprocess(decoded, output_type=call["output_type"])
    pipeline.maybe_free_model_hooks()
    return FluxPipelineOutput(images=images) if call["return_dict"] else (images,)
