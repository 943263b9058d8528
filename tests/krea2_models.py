"""Small random Krea 2 models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from torch import Tensor, nn

TEXT_WIDTH = 24
TEXT_LAYERS = 3
TEXT_TOKENS = 8
CHANNELS = 4


def tiny_transformer(*, seed: int = 0, **config: Any) -> Krea2Transformer2DModel:
    """A Krea 2 transformer of three blocks, random but with every path alive."""
    torch.manual_seed(seed)
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
    model = Krea2Transformer2DModel(**{**fields, **config})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval().requires_grad_(False)


def tiny_pipeline(*, seed: int = 0, is_distilled: bool = False, **config: Any) -> Krea2Pipeline:
    """A Krea 2 pipeline without text encoder: call it with `tiny_embeds`."""
    transformer = tiny_transformer(seed=seed, **config)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * CHANNELS,
        latents_std=[1.5] * CHANNELS,
    )
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        vae=vae.eval().requires_grad_(False),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
