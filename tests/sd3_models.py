"""Small random Stable Diffusion 3.5 models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from models import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, pipeline_of, random_model, tiny_vae
from torch import Tensor

TOKENS = 7


def tiny_transformer(*, seed: int = 0, **config: Any) -> SD3Transformer2DModel:
    """A transformer of four blocks, two of them with dual attention; every path is alive."""
    fields: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": POOLED_WIDTH,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    return random_model(SD3Transformer2DModel, {**fields, **config}, seed)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> StableDiffusion3Pipeline:
    """A pipeline without text encoders: call it with `tiny_embeds`."""
    return pipeline_of(
        StableDiffusion3Pipeline,
        transformer=tiny_transformer(seed=seed, **config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
    )


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, Tensor]:
    """Prompt embeddings as a pipeline call takes them, padded to one length as its encoders do."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(len(lengths), TOKENS, TEXT_WIDTH, generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]
    pooled = torch.randn(len(lengths), POOLED_WIDTH, generator=generator)
    return {
        f"{prefix}prompt_embeds": embeds * mask[..., None],
        f"{prefix}pooled_prompt_embeds": pooled,
    }
