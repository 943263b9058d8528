"""The engine with true classifier-free guidance, against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.guiders import ClassifierFreeGuidance
from driving import FINE
from models import (
    eager,
    latents_of,
    noise,
    prompting_pipeline,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
    tiny_transformer,
)

from ddit_rt import StaticPolicy, ops
from ddit_rt.models.base import Grid
from ddit_rt.models.flux import FluxFamily

NEGATIVE = {f"negative_{name}": value for name, value in tiny_embeds(2, seed=2).items()}


@pytest.mark.parametrize(("guidance_embeds", "batched"), [(False, True), (True, False)])
def test_true_guidance_equals_diffusers(guidance_embeds: bool, batched: bool) -> None:
    """Also beside the distilled guidance, which both passes are given."""
    pipeline = tiny_pipeline(guidance_embeds=guidance_embeds)
    engine = eager(pipeline)
    engine.batched_guidance = batched
    call = {"height": 64, "width": 48, "num_inference_steps": 8, "output_type": "latent"}
    arguments = {**tiny_embeds(2), **NEGATIVE, **call, "true_cfg_scale": 4.0}
    expected = latents_of(pipeline(**arguments, generator=seeded()))
    actual = latents_of(engine(**arguments, generator=seeded(), patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    unguided = latents_of(engine(**tiny_embeds(2), **call, generator=seeded(), patch_policy=FINE))
    assert not torch.allclose(actual, unguided, atol=0.1)


def test_true_guidance_of_prompts_equals_diffusers() -> None:
    """Through the compiled pipeline's own encoding, here one of noise per prompt."""
    pipeline = prompting_pipeline()
    engine = eager(pipeline)
    call: dict[str, Any] = {
        "prompt": ["a cat", "the sea"],
        "negative_prompt": ["a dog", "rain"],
        "true_cfg_scale": 2.5,
        "height": 64,
        "width": 64,
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    expected = latents_of(pipeline(**call, generator=seeded()))
    actual = latents_of(engine(**call, generator=seeded(), patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    engine(**{**call, "negative_prompt": "rain"}, patch_policy=StaticPolicy("2p:0.5,p"))
    with pytest.raises(ValueError, match=r"true_cfg_scale=2\.5 without a negative prompt"):
        engine(**{**call, "negative_prompt": None})


def test_guidance_interval_is_the_one_of_diffusers_guiders() -> None:
    """Step by step by hand: which steps diffusers' own guider calls guided."""
    transformer, latents = tiny_transformer(), noise(1, 4, 8, 8)
    engine = eager(transformer)
    conditioning = tiny_conditioning(transformer)
    negative = tiny_conditioning(transformer, seed=2)
    second = {f"negative_{name}": value for name, value in negative.items()}
    interval, steps, scale = (0.2, 0.7), 9, 3.0
    guider = ClassifierFreeGuidance(guidance_scale=scale, start=interval[0], stop=interval[1])
    scheduler = FlowMatchEulerDiscreteScheduler()
    FluxFamily().set_timesteps(scheduler, steps, None, Grid(height=4, width=4))
    expected = ops.pack(latents, 2)
    ids = {"img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)}
    ids["txt_ids"] = torch.zeros(7, 3)
    guided = []
    for step, timestep in enumerate(scheduler.timesteps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=timestep)
        guided.append(guider.num_conditions == 2)
        prompt, rival = (
            transformer(
                hidden_states=expected,
                timestep=timestep.reshape(1) / 1000,
                **text,
                **ids,
                return_dict=False,
            )[0]
            for text in (conditioning, negative)
        )
        velocity = guider.forward(prompt, rival if guided[-1] else None).pred
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
    assert guided == [False] + [True] * 5 + [False] * 3
    for batched in (True, False):
        engine.batched_guidance = batched
        final = engine.denoise(
            latents,
            num_inference_steps=steps,
            guidance_interval=interval,
            true_cfg_scale=torch.tensor(scale),
            patch_policy=FINE,
            **conditioning,
            **second,
        )
        torch.testing.assert_close(ops.pack(final, 2), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_interval": (0.5, 0.2)}, "0 <= start <= stop <= 1"),
        ({"guidance_interval": (0.0, 0.5)}, "without classifier-free guidance"),
        ({"true_cfg_scale": torch.tensor(2.0)}, "`negative_encoder_hidden_states` is missing"),
        ({"true_cfg_scale": torch.ones(1)}, r"shape \[1\]; expected \[\]"),
    ],
)
def test_bad_guidance_is_named(arguments: dict[str, Any], message: str) -> None:
    transformer = tiny_transformer()
    engine = eager(transformer)
    with pytest.raises(ValueError, match=message):
        engine.denoise(noise(1, 4, 8, 8), **tiny_conditioning(transformer), **arguments)
