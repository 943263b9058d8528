"""Wan image to video against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from driving import FINE, assert_equal, keep, latents_of
from models import TEXT_WIDTH, noise, seeded
from wan_models import CALL, CHANNELS, TEXT_TOKENS, eager, wan_pipeline

from ddit_rt.errors import UnsupportedModelError


def image_pipeline(*, embedded: bool = False, **config: Any) -> WanImageToVideoPipeline:
    more = {"image_dim": 20, "added_kv_proj_dim": 32} if embedded else {}
    whole = wan_pipeline(in_channels=2 * CHANNELS + 4, out_channels=CHANNELS, **more)
    parts = {name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "vae")}
    pipeline = WanImageToVideoPipeline(
        **parts, scheduler=whole.scheduler, transformer=whole.transformer, **config
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
