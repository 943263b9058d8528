"""Small random FLUX pipelines that start from pictures, of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
)
from models import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, noise, pipeline_of, tiny_pipeline
from torch import Tensor

MASK_CHANNELS = 16
"""Pixels of a latent pixel: the tiny VAE makes one of 4 x 4."""


def edit_pipeline(kind: type, **config: Any) -> Any:
    """A pipeline of a class over the parts of the tiny text-to-image one."""
    if kind is FluxFillPipeline:
        config = {
            "in_channels": 4 * (2 * CHANNELS + MASK_CHANNELS),
            "out_channels": 4 * CHANNELS,
            **config,
        }
    parts = tiny_pipeline(**{"guidance_embeds": True, **config}).components
    names = ("image_encoder", "feature_extractor")
    return pipeline_of(kind, **{name: one for name, one in parts.items() if name not in names})


def img2img() -> Any:
    """Image to image."""
    return edit_pipeline(FluxImg2ImgPipeline)


def inpaint() -> Any:
    """Inpainting by blending."""
    return edit_pipeline(FluxInpaintPipeline)


def kontext() -> Any:
    """Editing by reference."""
    return edit_pipeline(FluxKontextPipeline)


def fill() -> Any:
    """Inpainting by a model of its own."""
    return edit_pipeline(FluxFillPipeline)


def embeds(lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = "") -> dict[str, Tensor]:
    """Prompt embeddings, one for each length: FLUX pads all prompts to one."""
    batch = len(lengths)
    return {
        f"{prefix}prompt_embeds": noise(batch, 7, TEXT_WIDTH, seed=seed),
        f"{prefix}pooled_prompt_embeds": noise(batch, POOLED_WIDTH, seed=seed + 50),
    }


def picture(seed: int = 1, height: int = 64, width: int = 96) -> Tensor:
    """A picture in [0, 1]."""
    return torch.sigmoid(noise(1, 3, height, width, seed=seed))


def mask() -> Tensor:
    """The right half, but for a strip."""
    white = torch.zeros(1, 1, 64, 96)
    white[..., 44:] = 1
    white[..., 30:34, 60:] = 0
    return white
