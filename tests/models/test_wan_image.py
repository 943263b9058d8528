"""Wan image to video against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from driving import FINE, assert_equal, keep, latents_of
from family_suite import graphs
from models import TEXT_WIDTH, noise, seeded
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from wan_models import CALL, CHANNELS, TEXT_TOKENS, eager, wan_pipeline

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.loop import CudaExecutor

__all__ = ["graphs"]


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


def image_pipeline(*, embedded: bool = False, **config: Any) -> WanImageToVideoPipeline:
    more = {"image_dim": 20, "added_kv_proj_dim": 32} if embedded else {}
    whole = wan_pipeline(in_channels=2 * CHANNELS + 4, out_channels=CHANNELS, **more)
    parts = {name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "vae")}
    pipeline = WanImageToVideoPipeline(
        **parts,
        scheduler=whole.scheduler,
        transformer=whole.transformer,
        **(image_encoder() if embedded else {}),
        **config,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(**more: Any) -> dict[str, Any]:
    # The pipeline cleans a prompt by ftfy, which it needs installed.
    given = {name: value for name, value in CALL.items() if name != "prompt"}
    return {
        **given,
        "image": noise(1, 3, 64, 128).sigmoid(),
        "prompt_embeds": noise(1, TEXT_TOKENS, TEXT_WIDTH, seed=1),
        "negative_prompt_embeds": noise(1, TEXT_TOKENS, TEXT_WIDTH, seed=2),
        **more,
    }


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("driven", [False, True])
def test_all_fine_equals_diffusers(scale: float, driven: bool) -> None:
    pipeline = image_pipeline()
    engine = eager(pipeline, patch_sizes="p,2p")
    more = {"callback_on_step_end": keep} if driven else {}
    given = call(guidance_scale=scale)
    ours = latents_of(engine(**given, **more, generator=seeded(), patch_policy=FINE))
    theirs = pipeline(**given, generator=seeded()).frames
    assert_equal(ours, theirs, tolerance=1e-4)


@pytest.mark.parametrize("driven", [False, True])
def test_image_embeddings_reach_the_blocks(driven: bool) -> None:
    pipeline = image_pipeline(embedded=True)
    text = {"prompt_embeds": noise(1, 512, TEXT_WIDTH), "negative_prompt_embeds": None}
    given = call(guidance_scale=1.0, **text)
    more = {"callback_on_step_end": keep} if driven else {}
    engine = eager(pipeline, patch_sizes="p,2p")
    ours = latents_of(engine(**given, **more, generator=seeded(), patch_policy=FINE))
    theirs = pipeline(**given, generator=seeded()).frames
    assert_equal(ours, theirs, tolerance=1e-4)


def test_captured_runs_equal_the_cpus_to_the_bit(graphs: Any) -> None:
    cpu, device = (eager(image_pipeline(), patch_sizes="p,2p") for _ in range(2))
    device._loop.executor = CudaExecutor(graphs)
    for given in (call(), call(image=noise(1, 3, 64, 128, seed=5).sigmoid()), call()):
        ours, theirs = (
            latents_of(engine(**given, generator=seeded(), patch_policy="2p:0.5,p"))
            for engine in (device, cpu)
        )
        assert torch.equal(ours, theirs)


def test_coarse_steps_run() -> None:
    engine = eager(image_pipeline(), patch_sizes="p,2p")
    fine, mixed = (
        latents_of(engine(**call(), generator=seeded(), patch_policy=policy))
        for policy in (FINE, "2p:0.5,p")
    )
    assert torch.isfinite(mixed).all()
    assert float((fine - mixed).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("config", "part"),
    [({"expand_timesteps": True}, "timestep per token"), ({"boundary_ratio": 0.9}, "two experts")],
)
def test_what_does_not_fit_is_refused_by_name(config: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=part):
        eager(image_pipeline(**config))
