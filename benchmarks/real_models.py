"""FLUX and Wan with random weights at chosen sizes, and the requests that the benchmark gives them.

No weight file is read: the weights are drawn on the device, so that a machine without network can
time the real FLUX.1-dev. Speed does not depend on their values. Quality, the hits of a feature
cache and the choices of a dynamic patch policy do, and mean nothing here.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

VAE_SCALE = 8
_FRAMES_PER_LATENT = 4

# The configurations of black-forest-labs/FLUX.1-dev and Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
_FLUX_SCHEDULER: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
_WAN_SCHEDULER: Mapping[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def _flux_config(
    layers: tuple[int, int],
    heads: tuple[int, int],
    text: tuple[int, int],
    axes: tuple[int, int, int],
    channels: int = 16,
) -> dict[str, Any]:
    """FLUX of so many double and single blocks, heads and their width, widths of both texts."""
    return {
        "in_channels": 4 * channels,
        "num_layers": layers[0],
        "num_single_layers": layers[1],
        "num_attention_heads": heads[0],
        "attention_head_dim": heads[1],
        "joint_attention_dim": text[0],
        "pooled_projection_dim": text[1],
        "guidance_embeds": True,
        "axes_dims_rope": axes,
    }


def _wan_config(
    layers: int, heads: tuple[int, int], text: int, inner: int, frequencies: int = 256
) -> dict[str, Any]:
    """Wan of so many blocks, heads and their width, widths of the text and the MLP."""
    return {
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "in_channels": 16,
        "out_channels": 16,
        "freq_dim": frequencies,
        "num_attention_heads": heads[0],
        "attention_head_dim": heads[1],
        "text_dim": text,
        "ffn_dim": inner,
        "num_layers": layers,
    }


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model, and the sizes that it is timed at unless others are asked for.

    Attributes:
        config: Configuration of the transformer.
        text_tokens: Text tokens of a prompt.
        sizes: Height, width and, of videos, frames, in pixels.
        steps: Numbers of denoising steps.
        batches: Batch sizes.
    """

    config: Mapping[str, Any]
    text_tokens: int
    sizes: tuple[tuple[int, int, int], ...]
    steps: tuple[int, ...]
    batches: tuple[int, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of a request.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        batch: Images or videos in one call.
        steps: Denoising steps.
        num_frames: Frames of a video; 0 for an image.
    """

    height: int
    width: int
    batch: int
    steps: int
    num_frames: int = 0

    @property
    def size_key(self) -> str:
        """Key of a record that does not depend on the number of steps."""
        frames = f"x{self.num_frames}" * (self.num_frames > 0)
        return f"{self.height}x{self.width}{frames}/batch{self.batch}"

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
        """Frames of the latent; 0 for an image."""
        return (self.num_frames - 1) // _FRAMES_PER_LATENT + 1 if self.num_frames else 0

    @property
    def arguments(self) -> dict[str, Any]:
        """The size and the steps as arguments of a pipeline's call."""
        frames = {"num_frames": self.num_frames} if self.num_frames else {}
        return {
            "height": self.height,
            "width": self.width,
            **frames,
            "num_inference_steps": self.steps,
            "output_type": "latent",
        }


class RealModel(ABC):
    """A model family.

    Attributes:
        name: As on the command line.
        title: For people.
        full: The preset at its real size.
        presets: By name.
        schedules: Of our methods, see `real_loops.py`.
        passes: Samples that the model sees for each one of the batch: two with guidance.
        notes: What the figures do not mean.
        pipeline_class: Of diffusers.
        scheduler: Its scheduler's class and settings.
        others: Further parts of the pipeline, which it does without.
        guidance_scale: Of a call.
        of_its_dtype: Whether a request's tensors are of the transformer's dtype, not in float32.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    full: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]
    schedules: ClassVar[tuple[str, ...]]
    passes: ClassVar[int] = 1
    notes: ClassVar[tuple[str, ...]] = (
        "weights are random: times are real, quality is not measured",
        "relative_error is meaningful for schedule 'fine' and for compiled diffusers only",
    )
    pipeline_class: ClassVar[Any]
    scheduler: ClassVar[tuple[Any, Mapping[str, Any]]]
    others: ClassVar[tuple[str, ...]] = ()
    guidance_scale: ClassVar[float]
    of_its_dtype: ClassVar[bool] = False

    @abstractmethod
    def transformer(
        self, preset: Preset, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Any:
        """A transformer whose weights are drawn on the device.

        Matrices are normal with variance 1 / inputs, which keeps the scale of activations; biases
        are 0 and the scales of norms 1, as at the start of a training.
        """

    @abstractmethod
    def shapes(self, config: Any, preset: Preset, case: Case) -> dict[str, tuple[int, ...]]:
        """What a request has of each sample, by the transformer's configuration."""

    def pipeline(self, transformer: Any) -> Any:
        """A pipeline without text encoders and VAE: call it with `request`."""
        scheduler, settings = self.scheduler
        parts = ("vae", "text_encoder", "tokenizer", *self.others)
        pipeline = self.pipeline_class(
            scheduler=scheduler(**settings), transformer=transformer, **dict.fromkeys(parts)
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def request(self, pipeline: Any, preset: Preset, case: Case) -> dict[str, Any]:
        """Arguments of a pipeline's call, and of an engine's, without text encoders and VAE.

        Noise and embeddings are drawn on the CPU, sample by sample: the same on every device, and
        for a sample in any batch.
        """
        transformer = pipeline.transformer
        tensors = {}
        shapes = self.shapes(transformer.config, preset, case)
        for salt, (name, shape) in enumerate(shapes.items(), 1):
            seeds = (1000 * sample + salt for sample in range(case.batch))
            drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
            dtype = transformer.dtype if self.of_its_dtype else torch.float32
            tensors[name] = torch.stack(drawn).to(transformer.device, dtype)
        return {**tensors, **case.arguments, "guidance_scale": self.guidance_scale}

    def cache(self, steps: int) -> MagCacheConfig | None:  # noqa: ARG002 - of those that have one
        """What diffusers offers to skip steps, where that says anything with random weights."""
        return None

    def latents(self, output: Any) -> Tensor:
        """Final latents of a call, as the pipeline lays them out."""
        found: Tensor = output.frames if hasattr(output, "frames") else output.images
        return found

    def with_shared_weights(self, pipeline: Any) -> Any:
        """A pipeline around modules of its own that read the same tensors.

        What compiles or hooks the transformer gets such a copy, so that twelve billion weights
        stand in memory once and no method sees the changes of another.
        """
        original = pipeline.transformer
        tensors = (*original.parameters(), *original.buffers())
        return self.pipeline(copy.deepcopy(original, {id(tensor): tensor for tensor in tensors}))


class Flux(RealModel):
    """FLUX.1-dev."""

    name, title, full = "flux", "FLUX", "flux-dev"
    schedules = ("fine", "paper_2.18x", "paper_3.52x", "dynamic")
    notes = (*RealModel.notes, "the choices of schedule 'dynamic' are arbitrary")
    pipeline_class, others = FluxPipeline, ("text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler, _FLUX_SCHEDULER
    guidance_scale, of_its_dtype = 3.5, True
    presets: ClassVar[Mapping[str, Preset]] = {
        "flux-dev": Preset(
            config=_flux_config((19, 38), (24, 128), (4096, 768), (16, 56, 56)),
            text_tokens=512,
            sizes=((1024, 1024, 0), (512, 512, 0)),
            batches=(1, 4),
            steps=(28, 50),
        ),
        "small": Preset(
            config=_flux_config((2, 4), (4, 64), (256, 128), (8, 28, 28)),
            text_tokens=32,
            sizes=((256, 256, 0),),
            steps=(28,),
        ),
        # For smoke tests: its figures mean nothing.
        "tiny": Preset(
            config=_flux_config((1, 2), (2, 16), (24, 20), (4, 6, 6), channels=4),
            text_tokens=7,
            sizes=((128, 128, 0),),
            steps=(8,),
        ),
    }

    def transformer(
        self, preset: Preset, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> FluxTransformer2DModel:
        """See `RealModel.transformer`; never in memory in another dtype."""
        with torch.device("meta"):
            model = FluxTransformer2DModel(**preset.config)
        # Past `ModelMixin.to`, which warns of modules to be kept in float32 that FLUX has none of.
        nn.Module.to(model, dtype)
        model = model.to_empty(device=device).eval().requires_grad_(False)
        assert not list(model.buffers()), "a buffer would be left without values"
        return _drawn(model, device, seed)

    def shapes(self, config: Any, preset: Preset, case: Case) -> dict[str, tuple[int, ...]]:
        """See `RealModel.shapes`; latents are as the pipeline packs them."""
        return {
            "prompt_embeds": (preset.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
            "latents": (case.latent[0] * case.latent[1] // 4, config.in_channels),
        }


class Wan(RealModel):
    """Wan 2.1 1.3B, guided: each step runs two passes."""

    name, title, full, passes = "wan", "Wan", "wan-1.3b", 2
    # The paper's speed-ups of Wan 2.1 1.3B: 1.6x, 2.1x and, of its schedule with TeaCache, 3.2x. So
    # 2.1x has a row with skipped steps too, and 3.2x is without them, to show the larger share.
    schedules = (
        *("fine", "paper_1.60x", "paper_2.10x", "paper_3.20x", "dynamic"),
        *("fine+teacache", "paper_2.10x+teacache"),
    )
    notes = (
        *RealModel.notes,
        "the choices of schedule 'dynamic' are arbitrary",
        (
            "every other step reuses with '+teacache' and in 'mag_cache', about the share of "
            "TeaCache at 0.08 on Wan 2.1 1.3B; which steps those are is arbitrary, what they cost "
            "is not"
        ),
    )
    pipeline_class = WanPipeline
    scheduler = UniPCMultistepScheduler, _WAN_SCHEDULER
    guidance_scale = 5.0
    presets: ClassVar[Mapping[str, Preset]] = {
        "wan-1.3b": Preset(
            config=_wan_config(30, (12, 128), 4096, 8960),
            text_tokens=512,
            sizes=((480, 832, 81),),
            steps=(50,),
        ),
        "small": Preset(
            config=_wan_config(4, (4, 64), 256, 1024),
            text_tokens=32,
            sizes=((256, 384, 9),),
            steps=(50,),
        ),
        # For smoke tests: its figures mean nothing.
        "tiny": Preset(
            config=_wan_config(2, (2, 16), 24, 48, frequencies=32),
            text_tokens=7,
            sizes=((128, 128, 5),),
            steps=(16,),
        ),
    }

    @torch.no_grad()
    def transformer(
        self, preset: Preset, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> WanTransformer3DModel:
        """See `RealModel.transformer`.

        Modules that diffusers keeps in float32 are left so, as `from_pretrained` leaves them.
        """
        with torch.device(device):
            model = WanTransformer3DModel(**preset.config)
        _drawn(model.eval().requires_grad_(False), device, seed)
        for name, parameter in model.named_parameters():
            if not set(name.split(".")) & set(model._keep_in_fp32_modules):  # noqa: SLF001
                parameter.data = parameter.data.to(dtype)
        return model

    def shapes(self, config: Any, preset: Preset, case: Case) -> dict[str, tuple[int, ...]]:
        """See `RealModel.shapes`."""
        text = (preset.text_tokens, config.text_dim)
        latents = (config.in_channels, case.latent_frames, *case.latent)
        return {"prompt_embeds": text, "negative_prompt_embeds": text, "latents": latents}

    def cache(self, steps: int) -> MagCacheConfig:
        """MagCache, so set that the steps reuse that do in `fine+teacache`.

        diffusers has no TeaCache. With ratios of 1 and at most one reuse in a row, every other step
        reuses, whatever the weights are; the hits of its FirstBlockCache would be arbitrary.
        """
        return MagCacheConfig(
            max_skip_steps=1,
            retention_ratio=1 / steps,
            num_inference_steps=steps,
            mag_ratios=[1.0] * steps,
        )


MODELS: Mapping[str, RealModel] = {"flux": Flux(), "wan": Wan()}


def _drawn(model: Any, device: torch.device, seed: int) -> Any:
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return model
