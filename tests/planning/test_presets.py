"""Calibrated plans by name or speed, through the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import FINE, trace_of
from models import latents_of, noise, seeded, tiny_conditioning, tiny_embeds

from ddit_rt import Engine, MagCache, NoCache, SpectralPolicy, StaticPolicy, StepCache
from ddit_rt.artifact import PRESETS, CalibratedPlan, Calibration
from ddit_rt.models import FAMILIES
from ddit_rt.planning.request import read_request
from ddit_rt.policies import PatchPolicy, published_fast_plan

CACHE = MagCache(threshold=1.0, retention_ratio=0.2, mag_ratios=(0.9,))
HALF = StaticPolicy("2p:0.5,p")


def plan(
    policy: PatchPolicy, steps: int, speedup: float, cache: StepCache | None = None
) -> CalibratedPlan:
    return CalibratedPlan(
        kind="any",
        label=f"{steps} steps",
        policy=policy.to_dict(),
        num_inference_steps=steps,
        cost=1 / speedup,
        speedup=speedup,
        ssim=0.9,
        psnr=30.0,
        step_cache=None if cache is None else cache.to_dict(),
    )


@pytest.fixture
def calibrated(engine: Engine) -> Engine:
    """For 8 steps: all fine; 2p for half of them, with a step cache; five fine steps."""
    return with_front(
        engine,
        plan(FINE, 8, 1.0),
        plan(HALF, 8, 1.4, CACHE),
        plan(FINE, 5, 1.6),
    )


def with_front(engine: Engine, *front: CalibratedPlan, **arguments: Any) -> Engine:
    calibration = Calibration(
        num_inference_steps=8,
        cost_unit="tokens",
        target={"speedup": 1.4},
        presets=dict(zip(PRESETS, front, strict=True)),
        front=front,
        evidence={"arguments": arguments},
    )
    engine.artifact = engine.artifact.with_calibration(calibration)
    return engine


def call(engine: Engine, **arguments: Any) -> torch.Tensor:
    fixed = {"height": 64, "width": 64, "output_type": "latent", "generator": seeded()}
    return latents_of(engine(**tiny_embeds(), **fixed, **arguments))


@pytest.mark.parametrize(
    ("choice", "steps", "own"),
    [
        ("quality", 8, {"patch_policy": FINE}),
        ("balanced", 8, {"patch_policy": HALF, "step_cache": CACHE}),
        ("fast", 5, {"patch_policy": FINE}),
        (0.5, 8, {"patch_policy": HALF, "step_cache": CACHE}),
        (1, 5, {"patch_policy": FINE}),
    ],
)
def test_preset_runs_as_its_policy_and_step_cache_do(
    calibrated: Engine, choice: str | float, steps: int, own: dict[str, Any]
) -> None:
    expected = call(calibrated, num_inference_steps=steps, **own)
    actual = call(calibrated, num_inference_steps=8, patch_policy=choice)
    assert torch.equal(actual, expected)
    trace = trace_of(calibrated)
    assert len(trace) == steps
    assert (trace.reused > 0) == ("step_cache" in own)
    assert f"{choice!r} of the calibration for 8 steps: {steps} steps" in trace.notes


def test_preset_says_where_it_was_not_calibrated(engine: Engine) -> None:
    """Aloud once, in the trace always; not of what the call leaves at its default."""
    fine = plan(FINE, 8, 1.0)
    with_front(engine, fine, fine, fine, height=128, width=64, guidance_scale=3.5, num_frames=9)
    arguments = {"num_inference_steps": 8, "patch_policy": "fast"}
    with pytest.warns(UserWarning, match="calibrated with height=128, not 64: ") as told:
        call(engine, **arguments)
    assert [Path(one.filename).name for one in told] == ["test_presets.py"]
    call(engine, **arguments)
    trace = trace_of(engine)
    assert sum("calibrated with height=128, not 64" in note for note in trace.notes) == 1
    ignored = pytest.warns(UserWarning, match="guidance_scale=2 is ignored")
    told_again = pytest.warns(UserWarning, match="height=128, not 64; guidance_scale=3.5, not 2.0")
    with ignored, told_again:
        call(engine, **arguments, guidance_scale=2.0)


def test_preset_for_another_number_of_steps_is_refused(calibrated: Engine) -> None:
    with pytest.raises(ValueError, match=r"for 9 steps .* only for \[8\] steps"):
        call(calibrated, num_inference_steps=9, patch_policy="balanced")
    # The pipeline's own default.
    with pytest.raises(ValueError, match="for 28 steps"):
        call(calibrated, patch_policy=0.5)


def test_preset_without_calibration_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not calibrated at all; run `ddit-rt calibrate"):
        call(engine, num_inference_steps=8, patch_policy="balanced")


def test_fast_before_a_calibration_is_what_is_published_and_says_so(engine: Engine) -> None:
    expected = call(engine, num_inference_steps=8, patch_policy=SpectralPolicy(0.05))
    actual = call(engine, num_inference_steps=8, patch_policy="fast")
    assert torch.equal(actual, expected)
    trace = trace_of(engine)
    assert {"p", "2p"} == set(trace.patch_sizes())
    text = "'fast' is a published default, not calibrated on this model: SPEED (arXiv 2605.18736"
    assert any(note.startswith(text) for note in trace.notes)
    assert any("spectrum published for the VAE of FLUX.1" in note for note in trace.notes)


def test_a_calibration_takes_the_place_of_what_is_published(calibrated: Engine) -> None:
    """Also for numbers of steps that it is not for: those are refused as ever."""
    with pytest.raises(ValueError, match=r"for 9 steps .* only for \[8\] steps"):
        call(calibrated, num_inference_steps=9, patch_policy="fast")


def test_published_plans_are_of_families_that_there_are() -> None:
    names = {family.name for family in FAMILIES}
    published = {name for name in names if published_fast_plan(name) is not None}
    assert published == {"flux", "flux2", "qwen-image", "wan", "z-image"}


def test_fast_of_a_family_without_a_published_plan_is_refused(engine: Engine) -> None:
    manifest = replace(engine.artifact.manifest, family="sd3")
    with pytest.raises(ValueError, match="not calibrated at all; run `ddit-rt calibrate"):
        read_request(manifest, lambda: (8, False), {}, patch_policy="fast")


def test_fewer_steps_do_not_fit_given_sigmas(calibrated: Engine) -> None:
    sigmas = [1 - index / 8 for index in range(8)]
    call(calibrated, sigmas=sigmas, num_inference_steps=8, patch_policy="balanced")
    with pytest.raises(ValueError, match="leave `sigmas` out"):
        call(calibrated, sigmas=sigmas, num_inference_steps=8, patch_policy="fast")


@pytest.fixture
def placed(engine: Engine) -> Engine:
    """The fastest plan runs five steps at levels of its own."""
    fine = plan(FINE, 8, 1.0)
    return with_front(engine, fine, fine, replace(plan(FINE, 5, 1.6), sigmas=LEVELS))


LEVELS = (1.0, 0.9, 0.75, 0.5, 0.2)


def test_plan_brings_its_noise_levels(placed: Engine) -> None:
    expected = call(placed, sigmas=list(LEVELS), patch_policy=FINE)
    assert torch.equal(call(placed, num_inference_steps=8, patch_policy="fast"), expected)
    sigmas = [1 - index / 8 for index in range(8)]
    with pytest.raises(ValueError, match="runs 5 of its own at its own noise levels, and `sigmas`"):
        call(placed, sigmas=sigmas, patch_policy="fast")


def test_bare_loop_takes_the_levels_of_a_plan(placed: Engine) -> None:
    conditioning = tiny_conditioning(placed.pipeline.transformer)
    latents = noise(1, 4, 16, 16)
    own = {"sigmas": list(LEVELS), "patch_policy": FINE}
    expected = placed.denoise(latents, **own, **conditioning)
    preset = {"num_inference_steps": 8, "patch_policy": "fast"}
    assert torch.equal(placed.denoise(latents, **preset, **conditioning), expected)


def test_own_step_cache_takes_the_place_of_the_plans(calibrated: Engine) -> None:
    for own in (NoCache(), MagCache(threshold=0.01, mag_ratios=(0.999,))):
        expected = call(calibrated, num_inference_steps=8, patch_policy=HALF, step_cache=own)
        actual = call(calibrated, num_inference_steps=8, patch_policy="balanced", step_cache=own)
        assert torch.equal(actual, expected)


def test_policy_of_the_callers_own_brings_no_step_cache(calibrated: Engine) -> None:
    call(calibrated, num_inference_steps=8, patch_policy=HALF)
    assert trace_of(calibrated).reused == 0


def test_plan_without_a_step_cache_leaves_the_artifacts_out_and_says_so(calibrated: Engine) -> None:
    manifest = replace(calibrated.artifact.manifest, step_cache=CACHE.to_dict())
    calibrated.artifact = replace(calibrated.artifact, manifest=manifest)
    call(calibrated, num_inference_steps=8, patch_policy="quality")
    trace = trace_of(calibrated)
    assert trace.reused == 0
    assert "the artifact's step cache is left out" in trace.notes[-1]
    call(calibrated, num_inference_steps=8, patch_policy=FINE)
    assert trace_of(calibrated).reused > 0


@pytest.mark.parametrize("choice", [True, ["p"], {}])
def test_choice_of_another_type_is_refused(calibrated: Engine, choice: Any) -> None:
    with pytest.raises(TypeError, match="pass a policy such as"):
        call(calibrated, num_inference_steps=8, patch_policy=choice)
