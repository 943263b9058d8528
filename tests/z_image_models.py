"""Small random Z-Image models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

TEXT_WIDTH = 24
CHANNELS = 4


def tiny_transformer(*, seed: int = 0, **config: Any) -> ZImageTransformer2DModel:
    """One block in each refiner and three behind them, random but with every path alive."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "in_channels": CHANNELS,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
    }
    model = ZImageTransformer2DModel(**{**fields, **config})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1, std=0.08)
    return model.eval().requires_grad_(False)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> ZImagePipeline:
    """A Z-Image pipeline without text encoder: call it with `tiny_embeds`."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.eval().requires_grad_(False),
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_transformer(seed=seed, **config),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, list[Tensor]]:
    """Prompt embeddings as a pipeline call takes them, one tensor for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(length, TEXT_WIDTH, generator=generator) for length in lengths]
    return {f"{prefix}prompt_embeds": embeds}
