"""Small random FLUX.2 models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model
from torch import Tensor


def tiny_transformer(*, seed: int = 0, **config: Any) -> Flux2Transformer2DModel:
    """Two double and two single blocks, random but with every path alive."""
    fields: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return random_model(Flux2Transformer2DModel, {**fields, **config}, seed)


def tiny_vae() -> AutoencoderKLFlux2:
    """A VAE whose batch norm differs from channel to channel, and a little from place to place."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=2,
    )
    generator = torch.Generator().manual_seed(5)
    for norm, low in ((vae.bn.running_mean, -0.5), (vae.bn.running_var, 2.0)):
        each = torch.rand(CHANNELS, 1, generator=generator) + low
        norm.copy_((each + 0.02 * torch.rand(CHANNELS, 4, generator=generator)).flatten())
    return vae.eval().requires_grad_(False)


def parts(**config: Any) -> dict[str, Any]:
    """Of either pipeline."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": tiny_vae(),
        "transformer": tiny_transformer(**config),
    }


def tiny_dev() -> Flux2Pipeline:
    """FLUX.2 dev, its guidance embedded: call it with `tiny_embeds`."""
    return pipeline_of(Flux2Pipeline, **parts(guidance_embeds=True))


def tiny_klein(*, is_distilled: bool = False, **config: Any) -> Flux2KleinPipeline:
    """FLUX.2 klein: call it with `tiny_embeds`."""
    return pipeline_of(Flux2KleinPipeline, **parts(**config), is_distilled=is_distilled)


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, Tensor]:
    """Prompt embeddings as a pipeline call takes them, padded: no mask comes with them."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    embeds = torch.randn(len(lengths), longest, TEXT_WIDTH, generator=generator)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return {f"{prefix}prompt_embeds": embeds * mask[..., None]}
