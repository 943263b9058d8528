"""Small random models of the real classes, for tests."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

import ddit_rt
from ddit_rt.adapters import AdapterConfig, AdapterSet, PatchAdapter, untrained_lora
from ddit_rt.models.flux import FluxFamily

TEXT_WIDTH = 24
POOLED_WIDTH = 20
CHANNELS = 4


def random_model(kind: type, config: Mapping[str, Any], seed: int = 0, std: float = 0.08) -> Any:
    """A model of a class with random weights: diffusers' defaults are near zero in places."""
    torch.manual_seed(seed)
    model = kind(**config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def tiny_transformer(
    *, guidance_embeds: bool = False, seed: int = 0, **config: Any
) -> FluxTransformer2DModel:
    """A FLUX transformer of some 60k parameters, random but with every path alive."""
    fields: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": POOLED_WIDTH,
        "guidance_embeds": guidance_embeds,
        "axes_dims_rope": (4, 6, 6),
    }
    return random_model(FluxTransformer2DModel, {**fields, **config}, seed)


def pipeline_of(kind: type, **parts: Any) -> Any:
    """A pipeline of a class from its parts, without progress bar, and without text encoders."""
    names = inspect.signature(kind).parameters
    absent = {name: None for name in names if name.startswith(("text_encoder", "tokenizer"))}
    pipeline = kind(**{**absent, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae(levels: int = 4) -> AutoencoderKL:
    """A VAE of 8 pixels to a latent pixel, or with three levels of 4."""
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return vae.eval().requires_grad_(False)


def tiny_pipeline(
    *, guidance_embeds: bool = False, seed: int = 0, dynamic_shifting: bool = True, **config: Any
) -> FluxPipeline:
    """A FLUX pipeline without text encoders: call it with `tiny_embeds`."""
    transformer = tiny_transformer(guidance_embeds=guidance_embeds, seed=seed, **config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting)
    return pipeline_of(FluxPipeline, scheduler=scheduler, vae=tiny_vae(3), transformer=transformer)


def eager(model: Any, **options: Any) -> ddit_rt.Engine:
    """An engine of a pipeline or a transformer, whose blocks are not compiled."""
    return ddit_rt.compile(model, backend="eager", progress=False, **options)


def tiny_embeds(batch: int = 1, text_tokens: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Prompt embeddings as a pipeline call takes them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, text_tokens, TEXT_WIDTH, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, POOLED_WIDTH, generator=generator),
    }


def prompting_pipeline(**config: Any) -> FluxPipeline:
    """A tiny pipeline whose prompts embed as noise of their own."""
    pipeline = tiny_pipeline(**config)

    def encode_prompt(prompt: str | list[str], **_: Any) -> tuple[Tensor, ...]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        rows = [tiny_embeds(seed=zlib.crc32(one.encode())) for one in prompts]
        names = ("prompt_embeds", "pooled_prompt_embeds")
        embeds, pooled = (torch.cat([row[name] for row in rows]) for name in names)
        return embeds, pooled, torch.zeros(7, 3)

    pipeline.encode_prompt = encode_prompt
    return pipeline


def tiny_conditioning(
    transformer: FluxTransformer2DModel, batch: int = 1, text_tokens: int = 7, seed: int = 1
) -> dict[str, Tensor]:
    """Conditioning as `Engine.denoise` and the transformer take it."""
    embeds = tiny_embeds(batch, text_tokens, seed)
    conditioning = {
        "encoder_hidden_states": embeds["prompt_embeds"],
        "pooled_projections": embeds["pooled_prompt_embeds"],
    }
    if transformer.config.guidance_embeds:
        conditioning["guidance"] = torch.full((batch,), 3.5)
    return conditioning


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian latents from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_adapters(pipeline: FluxPipeline) -> AdapterSet:
    """Adapters in which every part does something."""
    family, adapters = FluxFamily(), {}
    for name in ("2p", "4p"):
        config = AdapterConfig(patch=name, rank=4, lora_alpha=8)
        torch.manual_seed(0)  # the residual's first layer starts random
        adapter = PatchAdapter.from_base(config, family, pipeline.transformer)
        adapter.requires_grad_(False)
        adapter.identifier.copy_(noise(*adapter.identifier.shape) * 0.1)
        adapter.residual_out.weight.copy_(noise(*adapter.residual_out.weight.shape) * 0.05)
        lora = untrained_lora(family, pipeline.transformer, config)
        adapter.lora = {
            key: noise(*value.shape, seed=index) * 0.1
            for index, (key, value) in enumerate(lora.items())
        }
        adapters[adapter.config.multiple] = adapter
    return AdapterSet(adapters=adapters)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def latents_of(result: Any) -> Tensor:
    """Of a pipeline that was asked for latents."""
    images = result.images
    assert isinstance(images, Tensor)
    return images
