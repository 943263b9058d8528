"""Small random Stable Diffusion 3.5 models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from chroma_models import tiny_vae
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

TEXT_WIDTH = 24
POOLED_WIDTH = 20
TOKENS = 7
CHANNELS = 4


def tiny_transformer(*, seed: int = 0, **config: Any) -> SD3Transformer2DModel:
    """A transformer of four blocks, two of them with dual attention; every path is alive."""
    torch.manual_seed(seed)
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
    model = SD3Transformer2DModel(**{**fields, **config})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval().requires_grad_(False)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> StableDiffusion3Pipeline:
    """A pipeline without text encoders: call it with `tiny_embeds`."""
    transformer = tiny_transformer(seed=seed, **config)
    names = ("text_encoder", "tokenizer")
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(CHANNELS),
        **{f"{name}{number}": None for name in names for number in ("", "_2", "_3")},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
