"""Small random Wan pipelines that start from pictures or videos, of the real classes, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVACEPipeline, WanVACETransformer3DModel
from driving import assert_equal, keep, runs
from family_suite import MIXED, FamilySuite, eager, generated
from models import TEXT_WIDTH, noise
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from wan_models import CHANNELS, in_half_precision, wan_pipeline, wan_transformer, wan_vae_16


class WanSuite(FamilySuite):
    """What holds of Wan's families besides: some of their weights stay in float32."""

    @pytest.mark.slow
    def test_half_precision_keeps_what_diffusers_keeps_in_float32(self) -> None:
        pipeline = in_half_precision(self.case.pipeline())
        engine, call = eager(pipeline), self.case.call((7,), (5,))
        assert engine.artifact.manifest.dtype == "bfloat16"
        ours, theirs = runs(pipeline, engine, call, callback_on_step_end=keep)
        assert_equal(ours, theirs)
        # bf16 keeps 8 bits, and guidance multiplies their error.
        assert_equal(*runs(pipeline, engine, call), tolerance=0.05)
        assert torch.isfinite(generated(engine, call, patch_policy=MIXED)).all()


BOUNDARY = 0.875
"""Of experts; with a shift of 3 and four or six steps the first two lie above it."""


def image_encoder() -> dict[str, Any]:
    """257 tokens, as the published one gives."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=2,
    )
    size = {"height": 32, "width": 32}
    return {
        "image_encoder": CLIPVisionModel(config).eval().requires_grad_(False),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size, do_rescale=False),
    }


def image_pipeline(
    *, embedded: bool = False, boundary_ratio: float | None = None, **config: Any
) -> WanImageToVideoPipeline:
    """Image to video: embedded, with image embeddings; with a boundary, of two experts."""
    config |= {"image_dim": 20, "added_kv_proj_dim": 32} if embedded else {}
    config = {"in_channels": 2 * CHANNELS + 4, "out_channels": CHANNELS, **config}
    whole = wan_pipeline(boundary_ratio=boundary_ratio, **config)
    encoder = image_encoder() if embedded else {}
    return put_together(WanImageToVideoPipeline, whole, boundary_ratio=boundary_ratio, **encoder)


def experts_pipeline() -> WanImageToVideoPipeline:
    """As Wan 2.2 A14B."""
    return image_pipeline(boundary_ratio=BOUNDARY)


def ti2v_pipeline(kind: type = WanImageToVideoPipeline) -> Any:
    """As Wan 2.2 TI2V 5B: a timestep for each token; by default image to video."""
    whole = wan_pipeline(in_channels=48, out_channels=48)
    return put_together(kind, whole, vae=wan_vae_16(), expand_timesteps=True)


VACE = {"num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 2 * CHANNELS + 64}


def vace_pipeline(boundary_ratio: float | None = None, **config: Any) -> WanVACEPipeline:
    """Control by a video, a mask and references; with a boundary, of two experts."""
    first, second = (
        wan_transformer(seed, WanVACETransformer3DModel, **{**VACE, **config}) for seed in (0, 1)
    )
    more = {} if boundary_ratio is None else {"transformer_2": second}
    more |= {"transformer": first, "boundary_ratio": boundary_ratio}
    return put_together(WanVACEPipeline, wan_pipeline(), **more)


def put_together(kind: type, whole: Any, **more: Any) -> Any:
    """A pipeline of a class over the parts of one of text to video."""
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer", "transformer_2")
    pipeline = kind(**{**{name: getattr(whole, name) for name in names}, **more})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeds(lengths: tuple[int, ...] = (7,), seed: int = 1, prefix: str = "") -> dict[str, Tensor]:
    """Prompt embeddings of these lengths, padded with zeros to the longest, as Wan pads.

    The pipelines of pictures clean a prompt by ftfy, which they need installed.
    """
    text = noise(len(lengths), max(lengths), TEXT_WIDTH, seed=seed)
    for row, tokens in zip(text, lengths, strict=True):
        row[tokens:] = 0
    return {f"{prefix}prompt_embeds": text}


def picture(seed: int = 1, height: int = 64, width: int = 96) -> Tensor:
    """In [0, 1]."""
    return noise(1, 3, height, width, seed=seed).sigmoid()


def with_picture(seed: int = 1) -> dict[str, Any]:
    """Arguments of a call of image to video, beside the prompt."""
    return {"image": picture(seed)}


def frames(seed: int = 1, height: int = 64, width: int = 96) -> list[Image.Image]:
    """Nine pictures."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (9, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def masks(height: int = 64, width: int = 96) -> list[Image.Image]:
    """Nine masks: the right half, but for a strip."""
    white = np.zeros((height, width), dtype=np.uint8)
    white[:, width // 2 - 4 :] = 255
    white[30:34, 60:] = 0
    return [Image.fromarray(white)] * 9


def with_video(seed: int = 1, height: int = 64, width: int = 96) -> dict[str, Any]:
    """Arguments of a call with all that VACE takes, beside the prompt."""
    return {
        "video": frames(seed, height, width),
        "mask": masks(height, width),
        "reference_images": frames(seed + 5, 40, 56)[:1],
        "conditioning_scale": [1.0, 0.7],
    }


GUIDED = {"guidance_scale": 4.0}
VIDEO = {"num_frames": 9, "guidance_scale": 1.0}
"""Three latent frames, and no guidance where none is asked for."""
