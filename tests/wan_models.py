"""Small random Wan models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from models import TEXT_WIDTH, noise, pipeline_of, random_model
from text_encoders import t5_words, umt5_model
from torch import Tensor, nn

CHANNELS = 4
TEXT_TOKENS = 12


def wan_transformer(
    seed: int = 0, kind: type[nn.Module] = WanTransformer3DModel, **config: Any
) -> Any:
    """A Wan transformer of a class, of some 40k parameters, random but with every path alive."""
    fields: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
    }
    return random_model(kind, {**fields, **config}, seed, std=0.1)


def wan_vae() -> AutoencoderKLWan:
    """Eight pixels and four frames to a latent, as the published one."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 1.0],
    )
    return vae.eval().requires_grad_(False)


def wan_vae_16() -> AutoencoderKLWan:
    """Sixteen pixels to a latent of 48 channels, by patches of 2 x 2 pixels, as TI2V's."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        num_res_blocks=1,
        latents_mean=[0.1] * 48,
        latents_std=[1.2] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return vae.eval().requires_grad_(False)


def unipc() -> UniPCMultistepScheduler:
    """The scheduler of the published pipelines."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def euler() -> FlowMatchEulerDiscreteScheduler:
    """The other common one."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def heun() -> FlowMatchHeunDiscreteScheduler:
    """Second order: the model is called twice at every noise level but the first."""
    return FlowMatchHeunDiscreteScheduler(shift=3.0)


def wan_pipeline(
    scheduler: Any = None, seed: int = 0, *, boundary_ratio: float | None = None, **config: Any
) -> WanPipeline:
    """A whole Wan pipeline that takes prompts; with a boundary, of two experts."""
    tokenizer = t5_words()
    return pipeline_of(
        WanPipeline,
        tokenizer=tokenizer,
        text_encoder=umt5_model(len(tokenizer)),
        vae=wan_vae(),
        scheduler=scheduler or unipc(),
        transformer=wan_transformer(seed, **config),
        transformer_2=None if boundary_ratio is None else wan_transformer(seed + 1, **config),
        boundary_ratio=boundary_ratio,
    )


def in_half_precision(pipeline: Any) -> Any:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` leaves the model."""
    kept = pipeline.transformer._keep_in_fp32_modules
    models = [one for one in (pipeline.transformer, pipeline.transformer_2) if one is not None]
    for name, tensor in (
        named for one in models for named in (*one.named_parameters(), *one.named_buffers())
    ):
        if not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(torch.bfloat16)
    return pipeline


def wan_conditioning(batch: int = 1, *, guidance_scale: float | None = None) -> dict[str, Tensor]:
    """Conditioning as `Engine.denoise` takes it."""
    shape = (batch, TEXT_TOKENS, TEXT_WIDTH)
    conditioning = {"encoder_hidden_states": noise(*shape, seed=1)}
    if guidance_scale is not None:
        conditioning["negative_encoder_hidden_states"] = noise(*shape, seed=2)
        conditioning["guidance_scale"] = torch.tensor(guidance_scale)
    return conditioning


CALL = {
    "prompt": "a cat",
    "height": 64,
    "width": 128,
    "num_frames": 9,
    "num_inference_steps": 6,
    "max_sequence_length": 12,
    "output_type": "latent",
}
"""A run of six steps whose latents are `[1, 4, 3, 8, 16]`."""
