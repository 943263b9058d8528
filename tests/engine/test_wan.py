"""The engine on Wan against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler
from driving import FINE, trace_of
from made_once import Packages
from models import eager, noise, seeded
from wan_models import (
    CALL,
    CHANNELS,
    euler,
    heun,
    in_half_precision,
    unipc,
    wan_conditioning,
    wan_pipeline,
    wan_transformer,
)

import ddit_rt
from ddit_rt import Engine, StaticPolicy, TokenRanges
from ddit_rt.errors import ShapeError


def multistep(kind: Any) -> Any:
    return lambda: kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.mark.parametrize(
    ("scheduler", "guidance_scale", "batched"),
    [
        (unipc, 5.0, True),
        (euler, 5.0, False),
        (heun, 1.0, True),
        (multistep(DPMSolverMultistepScheduler), 1.0, True),
        (multistep(DEISMultistepScheduler), 5.0, True),
    ],
)
def test_all_fine_equals_diffusers(scheduler: Any, guidance_scale: float, batched: bool) -> None:
    pipeline = wan_pipeline(scheduler())
    engine = eager(pipeline)
    engine.batched_guidance = batched
    call = {**CALL, "guidance_scale": guidance_scale, "negative_prompt": "a dog"}
    expected = pipeline(**call, generator=seeded()).frames
    actual = engine(**call, generator=seeded(), patch_policy=FINE).frames
    assert actual.shape == (1, CHANNELS, 3, 8, 16)
    # fp32 throughout; guidance multiplies rounding by up to 2 * 5, latents are of order 4.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert trace_of(engine).solver == type(pipeline.scheduler).__name__


def test_batches_equal_diffusers() -> None:
    pipeline = wan_pipeline()
    engine = eager(pipeline, ranges=TokenRanges(batch=(1, 8), image=(4, 32760)))
    call = {**CALL, "prompt": ["a cat", "the sea"], "num_videos_per_prompt": 2}
    expected = pipeline(**call, generator=seeded()).frames
    actual = engine(**call, generator=seeded(), patch_policy=FINE).frames
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scheduler", "batched"), [(unipc, False), (euler, True)])
def test_batch_of_two_prompts_equals_two_single_runs(scheduler: Any, batched: bool) -> None:
    """With coarse steps after fine ones, so that every sample has detail of its own to keep."""
    engine = eager(wan_pipeline(scheduler()), ranges=TokenRanges(batch=(1, 4), image=(4, 32760)))
    engine.batched_guidance = batched
    plan = StaticPolicy(["p", "2p", "4p", "p", "2p", "p"])
    call = {**CALL, "patch_policy": plan}
    prompts, starts = ["a cat", "the sea"], noise(2, CHANNELS, 3, 8, 16)
    negatives = ["a dog", "rain"]
    together = {"prompt": prompts, "negative_prompt": negatives, "latents": starts}
    both = engine(**{**call, **together}).frames
    for index in (0, 1):
        alone = {"prompt": prompts[index], "negative_prompt": negatives[index]}
        single = engine(**{**call, **alone, "latents": starts[index : index + 1]}).frames
        # Matrix products of another batch round differently; guidance multiplies that by ten.
        torch.testing.assert_close(both[index : index + 1], single, rtol=0, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=0.1)


@pytest.mark.filterwarnings("ignore:.p is not offered")
def test_every_size_of_one_engine_equals_diffusers(wan: Engine) -> None:
    """Frames, height and width change from run to run, with coarse steps of other sizes between."""
    sizes = [(64, 128, 9), (128, 64, 9), (64, 128, 1), (64, 128, 17), (80, 48, 5), (64, 128, 9)]
    call = {**CALL, "num_inference_steps": 3}
    for height, width, num_frames in sizes:
        size = {"height": height, "width": width, "num_frames": num_frames}
        expected = wan.pipeline(**{**call, **size}, generator=seeded()).frames
        actual = wan(**{**call, **size}, generator=seeded()).frames
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        plan = StaticPolicy(["p", "2p", "p"] if height % 32 == 0 == width % 32 else "p")
        coarse = wan(**{**call, **size}, generator=seeded(), patch_policy=plan).frames
        assert torch.isfinite(coarse).all()


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_videos_equal_diffusers(wan: Engine, output_type: str) -> None:
    call = {**CALL, "num_inference_steps": 3, "output_type": output_type}
    expected = wan.pipeline(**call, generator=seeded()).frames
    actual = wan(**call, generator=seeded()).frames
    assert len(actual[0]) == 9
    difference = np.abs(np.asarray(actual[0], float) - np.asarray(expected[0], float)).max()
    # One level of 255 in whole numbers; rounding through the VAE in floats.
    assert difference <= (1 if output_type == "pil" else 1e-4)


def test_compiled_blocks_equal_diffusers_at_every_patch_size(
    tmp_path: Path, packages: Packages
) -> None:
    """One package serves all, and comes back from a folder."""
    pipeline = wan_pipeline()
    with packages():
        engine = ddit_rt.compile(pipeline, height=64, width=128, num_frames=9, progress=False)
    engine = ddit_rt.load(engine.save(tmp_path / "wan.ddit"), pipeline, progress=False)
    call = {name: CALL[name] for name in CALL.keys() - {"height", "width", "num_frames"}}
    expected = pipeline(**CALL, generator=seeded()).frames
    actual = engine(**call, generator=seeded(), patch_policy=FINE).frames
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    plan = StaticPolicy(["4p", "p", "2p", "2p", "p", "p"])
    for size in ({}, {"height": 80, "width": 112}):  # latents of 8 x 16, and of 10 x 14
        own = {**CALL, **size, "generator": seeded(), "patch_policy": plan}
        expected = eager(pipeline)(**own).frames
        actual = engine(**call, **size, generator=seeded(), patch_policy=plan).frames
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_denoise_runs_a_bare_transformer() -> None:
    transformer, latents = wan_transformer(), noise(1, CHANNELS, 3, 8, 8)
    engine = eager(transformer)
    conditioning = wan_conditioning(guidance_scale=3.0)
    final = engine.denoise(
        latents, scheduler=unipc(), num_inference_steps=4, patch_policy=FINE, **conditioning
    )
    pipeline = wan_pipeline()
    pipeline.transformer = transformer
    expected = pipeline(
        prompt_embeds=conditioning["encoder_hidden_states"],
        negative_prompt_embeds=conditioning["negative_encoder_hidden_states"],
        guidance_scale=3.0,
        latents=latents,
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        output_type="latent",
    ).frames
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-4)
    with pytest.raises(ShapeError, match=r"expected \[B, 4, F, H, W\]"):
        engine.denoise(noise(1, CHANNELS, 8, 8), **conditioning)


def test_half_precision_keeps_what_diffusers_keeps_in_float32() -> None:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` leaves the model."""
    pipeline = wan_pipeline()
    plan = StaticPolicy(["p", "2p", "p", "p"])
    call = {**CALL, "num_inference_steps": 4}
    full = eager(pipeline)(**call, generator=seeded(), patch_policy=plan).frames
    engine = eager(in_half_precision(pipeline))
    assert engine.artifact.manifest.dtype == "bfloat16"
    expected = pipeline(**call, generator=seeded()).frames
    actual = engine(**call, generator=seeded(), patch_policy=FINE).frames
    # bf16 keeps 8 bits; guidance multiplies that error of velocities of order 1 by up to 10.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1)
    half = engine(**call, generator=seeded(), patch_policy=plan).frames
    torch.testing.assert_close(half, full, rtol=0, atol=0.2)


def test_default_size_is_checked_before_compiling() -> None:
    with pytest.raises(ShapeError, match="num_frames=10"):
        eager(wan_pipeline(), num_frames=10)
    engine = eager(wan_pipeline(), height=128, width=64, num_frames=5)
    result = engine("a", num_inference_steps=2, output_type="latent", max_sequence_length=12)
    assert result.frames.shape == (1, CHANNELS, 2, 16, 8)
