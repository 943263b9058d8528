"""Small random Chroma models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model, tiny_vae
from torch import Tensor


def tiny_transformer(*, seed: int = 0, **config: Any) -> ChromaTransformer2DModel:
    """A Chroma transformer of four blocks, random but with every path alive."""
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
    return random_model(ChromaTransformer2DModel, {**fields, **config}, seed)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> ChromaPipeline:
    """A Chroma pipeline without text encoder: call it with `tiny_embeds`."""
    return pipeline_of(
        ChromaPipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(),
        transformer=tiny_transformer(seed=seed, **config),
    )


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
