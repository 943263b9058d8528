"""Small random Chroma models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

TEXT_WIDTH = 24
CHANNELS = 4


def tiny_transformer(*, seed: int = 0, **config: Any) -> ChromaTransformer2DModel:
    """A Chroma transformer of four blocks, random but with every path alive."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 24,
        "approximator_layers": 1,
    }
    model = ChromaTransformer2DModel(**{**fields, **config})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval().requires_grad_(False)


def tiny_vae(channels: int) -> AutoencoderKL:
    """A VAE of 8 pixels to a latent pixel."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return vae.eval().requires_grad_(False)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> ChromaPipeline:
    """A Chroma pipeline without text encoder: call it with `tiny_embeds`."""
    transformer = tiny_transformer(seed=seed, **config)
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(CHANNELS),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, Tensor]:
    """Prompt embeddings and masks as a pipeline call takes them, one prompt for each length."""
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    embeds = torch.randn(batch, longest, TEXT_WIDTH, generator=generator)
    # As the pipeline's own encoder: the first padding token stays in.
    mask = torch.arange(longest)[None] <= torch.tensor(lengths)[:, None]
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask.float()}
