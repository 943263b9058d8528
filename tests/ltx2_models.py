"""Small random LTX-2 models of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from models import CHANNELS, TEXT_WIDTH, pipeline_of, random_model
from torch import Tensor

TEXT_LAYERS = 2
TEXT_TOKENS = 8


def tiny_transformer(*, seed: int = 0, **config: Any) -> LTX2VideoTransformer3DModel:
    """An LTX-2 transformer of three blocks, random but with every path alive."""
    fields: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 3,
        "caption_channels": TEXT_WIDTH,
        "vae_scale_factors": (2, 16, 16),
    }
    return random_model(LTX2VideoTransformer3DModel, {**fields, **config}, seed)


def _vae() -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatial", "spatiotemporal"),
        upsample_type=("spatial", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=4,
    )


def tiny_pipeline(*, seed: int = 0, **config: Any) -> LTX2Pipeline:
    """An LTX-2 pipeline without text encoder: call it with `tiny_embeds`."""
    transformer = tiny_transformer(seed=seed, **config)
    audio = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    own = {} if transformer.config.use_prompt_embeddings else {"per_modality_projections": True}
    widths = transformer.proj_in.out_features, transformer.audio_proj_in.out_features
    heads = [width // 8 for width in widths] if own else [3, 3]
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_LAYERS,
        video_connector_num_attention_heads=heads[0],
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=heads[1],
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        video_hidden_dim=widths[0],
        audio_hidden_dim=widths[1],
        **own,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    parts = {"vae": _vae(), "audio_vae": audio, "connectors": connectors, "vocoder": vocoder}
    return pipeline_of(
        LTX2Pipeline,
        **{name: part.eval().requires_grad_(False) for name, part in parts.items()},
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer,
    )


def tiny_embeds(
    lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = ""
) -> dict[str, Tensor]:
    """Prompt embeddings as a pipeline call takes them, all padded to one length on the left."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), TEXT_TOKENS, TEXT_WIDTH * TEXT_LAYERS)
    mask = torch.arange(TEXT_TOKENS)[None] >= TEXT_TOKENS - torch.tensor(lengths)[:, None]
    return {
        f"{prefix}prompt_embeds": torch.randn(shape, generator=generator),
        f"{prefix}prompt_attention_mask": mask.long(),
    }
