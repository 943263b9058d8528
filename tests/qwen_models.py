"""Small random Qwen-Image models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model
from torch import Tensor


def tiny_transformer(*, seed: int = 0, **config: Any) -> QwenImageTransformer2DModel:
    """A Qwen-Image transformer of three blocks, random but with every path alive."""
    fields: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return random_model(QwenImageTransformer2DModel, {**fields, **config}, seed)


def tiny_vae(std: float = 1.5) -> AutoencoderKLQwenImage:
    """A VAE of 8 pixels to a latent pixel."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * CHANNELS,
        latents_std=[std] * CHANNELS,
    )
    return vae.eval().requires_grad_(False)


def tiny_pipeline(*, seed: int = 0, **config: Any) -> QwenImagePipeline:
    """A Qwen-Image pipeline without text encoder: call it with `tiny_embeds`."""
    return _tiny(QwenImagePipeline, tiny_transformer(seed=seed, **config))


def tiny_edit_pipeline(kind: type = QwenImageEditPipeline) -> Any:
    """A pipeline for edits, on which pictures act strongly; its calls need one too."""
    return _tiny(kind, tiny_transformer(), std=0.02, processor=None)


def _tiny(
    kind: type, transformer: QwenImageTransformer2DModel, *, std: float = 1.5, **parts: Any
) -> Any:
    return pipeline_of(
        kind,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, max_image_seq_len=8192
        ),
        vae=tiny_vae(std),
        transformer=transformer,
        **parts,
    )


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, Tensor]:
    """Prompt embeddings as a pipeline call takes them, one prompt for each length, padded."""
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    embeds = torch.randn(batch, longest, TEXT_WIDTH, generator=generator)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return {
        f"{prefix}prompt_embeds": embeds * mask[..., None],
        f"{prefix}prompt_embeds_mask": mask.long(),
    }
