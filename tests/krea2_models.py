"""Small random Krea 2 models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model
from qwen_models import tiny_vae
from torch import Tensor

TEXT_LAYERS = 3
TEXT_TOKENS = 8


def tiny_transformer(*, seed: int = 0, **config: Any) -> Krea2Transformer2DModel:
    """A Krea 2 transformer of three blocks, random but with every path alive."""
    fields: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "timestep_embed_dim": 16,
        "text_hidden_dim": TEXT_WIDTH,
        "num_text_layers": TEXT_LAYERS,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    return random_model(Krea2Transformer2DModel, {**fields, **config}, seed)


def tiny_pipeline(*, seed: int = 0, is_distilled: bool = False, **config: Any) -> Krea2Pipeline:
    """A Krea 2 pipeline without text encoder: call it with `tiny_embeds`."""
    return pipeline_of(
        Krea2Pipeline,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        vae=tiny_vae(),
        transformer=tiny_transformer(seed=seed, **config),
        is_distilled=is_distilled,
    )


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, Tensor]:
    """Prompt embeddings as a pipeline call takes them, all padded to one length."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), TEXT_TOKENS, TEXT_LAYERS, TEXT_WIDTH)
    mask = torch.arange(TEXT_TOKENS)[None] < torch.tensor(lengths)[:, None]
    return {
        f"{prefix}prompt_embeds": torch.randn(shape, generator=generator),
        f"{prefix}prompt_embeds_mask": mask,
    }
