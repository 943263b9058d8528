"""Wan models with random weights at chosen sizes, and the requests that the benchmark gives them.

As in `flux_model.py`: speed does not depend on the values of the weights; quality and the choices
of a dynamic patch policy do, and mean nothing here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from flux_model import VAE_SCALE, Case, Preset
from torch import Tensor, nn

GUIDANCE_SCALE = 5.0
_FRAMES_PER_LATENT = 4

# The scheduler's configuration of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
SCHEDULER: Mapping[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}

_SHARED: Mapping[str, Any] = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}


@dataclass(frozen=True, kw_only=True)
class WanPreset(Preset):
    """One model, and the sizes that it is timed at unless others are asked for.

    Attributes:
        videos: Height, width and frames, in pixels.
    """

    videos: tuple[tuple[int, int, int], ...]


def _preset(videos: tuple[tuple[int, int, int], ...], steps: int, **config: Any) -> WanPreset:
    text_tokens = config.pop("text_tokens")
    return WanPreset(
        config={**_SHARED, "in_channels": 16, "out_channels": 16, **config},
        text_tokens=text_tokens,
        sizes=(),
        batches=(1,),
        steps=(steps,),
        videos=videos,
    )


PRESETS: Mapping[str, WanPreset] = {
    # At 480 x 832 patches of 4p do not divide the 60 rows of the latent; at 512 x 832 they do.
    "wan-1.3b": _preset(
        ((480, 832, 81), (512, 832, 81)),
        50,
        num_attention_heads=12,
        attention_head_dim=128,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=8960,
        num_layers=30,
        text_tokens=512,
    ),
    "small": _preset(
        ((256, 384, 9),),
        50,
        num_attention_heads=4,
        attention_head_dim=64,
        text_dim=256,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=4,
        text_tokens=32,
    ),
    # For smoke tests: its figures mean nothing.
    "tiny": _preset(
        ((128, 128, 5),),
        16,
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        text_tokens=7,
    ),
}


@dataclass(frozen=True, kw_only=True)
class WanCase(Case):
    """One size of a request.

    Attributes:
        num_frames: Frames of the video.
    """

    num_frames: int

    @property
    def size_key(self) -> str:
        """See `Case.size_key`."""
        return f"{self.height}x{self.width}x{self.num_frames}/batch{self.batch}"

    @property
    def latent_frames(self) -> int:
        """Frames of the latent."""
        return (self.num_frames - 1) // _FRAMES_PER_LATENT + 1


@torch.no_grad()
def random_transformer(
    preset: Preset, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> WanTransformer3DModel:
    """A transformer whose weights are drawn on the device, scaled as `flux_model` scales them.

    Modules that diffusers keeps in float32 are left so, as `from_pretrained` leaves them.
    """
    with torch.device(device):
        model = WanTransformer3DModel(**preset.config)
    model = model.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):  # noqa: SLF001
            parameter.data = parameter.data.to(dtype)
    return model


def pipeline_around(transformer: WanTransformer3DModel) -> WanPipeline:
    """A pipeline without text encoder and VAE: call it with `request`."""
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_shared_weights(pipeline: WanPipeline) -> WanPipeline:
    """A pipeline around modules of its own that read the same tensors."""
    original = pipeline.transformer
    tensors = (*original.parameters(), *original.buffers())
    return pipeline_around(copy.deepcopy(original, {id(tensor): tensor for tensor in tensors}))


def request(pipeline: WanPipeline, preset: Preset, case: WanCase, seed: int = 0) -> dict[str, Any]:
    """Arguments of a pipeline's call, and of an engine's, that leave text encoder and VAE out.

    Noise and embeddings are drawn on the CPU, sample by sample, as in `flux_model.request`.
    """
    transformer = pipeline.transformer
    config = transformer.config
    height, width = case.height // VAE_SCALE, case.width // VAE_SCALE

    def draw(salt: int, *shape: int) -> Tensor:
        seeds = (1000 * (seed + sample) + salt for sample in range(case.batch))
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(drawn).to(transformer.device)

    return {
        "prompt_embeds": draw(1, preset.text_tokens, config.text_dim),
        "negative_prompt_embeds": draw(2, preset.text_tokens, config.text_dim),
        "latents": draw(3, config.in_channels, case.latent_frames, height, width),
        "height": case.height,
        "width": case.width,
        "num_frames": case.num_frames,
        "num_inference_steps": case.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "latent",
    }
