"""FLUX models with random weights at chosen sizes, and the requests that the benchmarks give them.

No weight file is read: the weights are drawn on the device, so that a machine without network can
time the real FLUX.1-dev. Speed does not depend on their values. Quality, the hits of a feature
cache and the choices of a dynamic patch policy do, and mean nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

PATCH = 2
VAE_SCALE = 8
GUIDANCE_SCALE = 3.5

# The scheduler's configuration of black-forest-labs/FLUX.1-dev.
SCHEDULER: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model, and the sizes that it is timed at unless others are asked for.

    Attributes:
        config: Configuration of `FluxTransformer2DModel`.
        text_tokens: Text tokens of a prompt.
        sizes: Edges of square pictures, in pixels.
        batches: Batch sizes.
        steps: Numbers of denoising steps.
    """

    config: Mapping[str, Any]
    text_tokens: int
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]


PRESETS: Mapping[str, Preset] = {
    "flux-dev": Preset(
        config={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        text_tokens=512,
        sizes=(1024, 512),
        batches=(1, 4),
        steps=(28, 50),
    ),
    "small": Preset(
        config={
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 128,
            "guidance_embeds": True,
            "axes_dims_rope": (8, 28, 28),
        },
        text_tokens=32,
        sizes=(256,),
        batches=(1,),
        steps=(28,),
    ),
    # For smoke tests: its figures mean nothing.
    "tiny": Preset(
        config={
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        text_tokens=7,
        sizes=(128,),
        batches=(1,),
        steps=(8,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of a request.

    Attributes:
        height: Picture height in pixels.
        width: Picture width in pixels.
        batch: Pictures in one call.
        steps: Denoising steps.
    """

    height: int
    width: int
    batch: int
    steps: int

    @property
    def size_key(self) -> str:
        """Key of a record that does not depend on the number of steps."""
        return f"{self.height}x{self.width}/batch{self.batch}"

    @property
    def key(self) -> str:
        """Key of a record."""
        return f"{self.size_key}/steps{self.steps}"

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of the latent."""
        return self.height // VAE_SCALE, self.width // VAE_SCALE

    @property
    def latent_frames(self) -> int:
        """Frames of the latent; 0 for a picture."""
        return 0


def random_transformer(
    preset: Preset, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> FluxTransformer2DModel:
    """A transformer whose weights are drawn on the device.

    Matrices are normal with variance 1 / inputs, which keeps the scale of activations; biases are
    0 and the scales of norms 1, as at the start of a training.
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel(**preset.config)
    # Past `ModelMixin.to`, which warns of modules to be kept in float32 that FLUX does not have.
    nn.Module.to(model, dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    assert not list(model.buffers()), "a buffer would be left without values"
    return model


def pipeline_around(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A pipeline without text encoders and VAE: call it with `request`."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_shared_weights(pipeline: FluxPipeline) -> FluxPipeline:
    """A pipeline around modules of its own that read the same weights.

    What compiles or hooks the transformer gets such a copy, so that twelve billion weights stand
    in memory once and no contender sees the changes of another.
    """
    original = pipeline.transformer
    with torch.device("meta"):
        transformer = type(original).from_config(original.config)
    transformer.load_state_dict(original.state_dict(), assign=True)
    return pipeline_around(transformer.eval().requires_grad_(False))


def request(pipeline: FluxPipeline, preset: Preset, case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of a pipeline's call, and of an engine's, that leave text encoders and VAE out.

    Noise and embeddings are drawn on the CPU, sample by sample: the same on every device, and for
    a sample in any batch.
    """
    transformer = pipeline.transformer
    config = transformer.config
    rows, columns = (edge // PATCH for edge in case.latent)

    def draw(salt: int, *shape: int) -> Tensor:
        seeds = (1000 * (seed + sample) + salt for sample in range(case.batch))
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(drawn).to(transformer.device, transformer.dtype)

    return {
        "prompt_embeds": draw(1, preset.text_tokens, config.joint_attention_dim),
        "pooled_prompt_embeds": draw(2, config.pooled_projection_dim),
        "latents": draw(3, rows * columns, config.in_channels),
        "height": case.height,
        "width": case.width,
        "num_inference_steps": case.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "latent",
    }
