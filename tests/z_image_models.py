"""Small random Z-Image models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model, tiny_vae
from torch import Tensor, nn


def tiny_transformer(*, seed: int = 0, **config: Any) -> ZImageTransformer2DModel:
    """One block in each refiner and three behind them, random but with every path alive."""
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
    model = random_model(ZImageTransformer2DModel, {**fields, **config}, seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1, std=0.08)
    return model


def tiny_pipeline(*, seed: int = 0, **config: Any) -> ZImagePipeline:
    """A Z-Image pipeline without text encoder: call it with `tiny_embeds`."""
    return pipeline_of(
        ZImagePipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(),
        transformer=tiny_transformer(seed=seed, **config),
    )


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, list[Tensor]]:
    """Prompt embeddings as a pipeline call takes them, one tensor for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(length, TEXT_WIDTH, generator=generator) for length in lengths]
    return {f"{prefix}prompt_embeds": embeds}
