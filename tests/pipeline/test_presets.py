"""Calibrated plans by name or speed, through the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import noise, tiny_conditioning, tiny_embeds

from ddit_rt import Engine, FinePolicy, StaticPolicy
from ddit_rt.artifact import PRESETS, CalibratedPlan, Calibration
from ddit_rt.patch_scheduler import PatchPolicy


def plan(policy: PatchPolicy, steps: int, speedup: float) -> CalibratedPlan:
    return CalibratedPlan(
        kind="any",
        label=f"{steps} steps",
        policy=policy.to_dict(),
        num_inference_steps=steps,
        cost=1 / speedup,
        speedup=speedup,
        ssim=0.9,
        psnr=30.0,
    )


@pytest.fixture
def calibrated(engine: Engine) -> Engine:
    """For 8 steps: all fine; 2p for half of them; five fine steps."""
    front = (
        plan(FinePolicy(), 8, 1.0),
        plan(StaticPolicy("2p:0.5,p"), 8, 1.4),
        plan(FinePolicy(), 5, 1.6),
    )
    calibration = Calibration(
        num_inference_steps=8,
        cost_unit="tokens",
        target={"speedup": 1.4},
        presets=dict(zip(PRESETS, front, strict=True)),
        front=front,
        evidence={},
    )
    engine.artifact = engine.artifact.with_calibration(calibration)
    return engine


def call(engine: Engine, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    fixed = {"height": 64, "width": 64, "output_type": "latent", "generator": generator}
    images = engine(**tiny_embeds(), **fixed, **arguments).images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.mark.parametrize(
    ("choice", "policy", "steps"),
    [
        ("quality", FinePolicy(), 8),
        ("balanced", StaticPolicy("2p:0.5,p"), 8),
        ("fast", FinePolicy(), 5),
        (0.5, StaticPolicy("2p:0.5,p"), 8),
        (1, FinePolicy(), 5),
    ],
)
def test_preset_runs_as_its_policy_does(
    calibrated: Engine, choice: str | float, policy: PatchPolicy, steps: int
) -> None:
    expected = call(calibrated, num_inference_steps=steps, patch_policy=policy)
    actual = call(calibrated, num_inference_steps=8, patch_policy=choice)
    assert torch.equal(actual, expected)
    trace = calibrated.last_trace
    assert trace is not None
    assert len(trace) == steps
    assert trace.notes[-1] == f"{choice!r} of the calibration for 8 steps: {steps} steps"


def test_preset_of_a_bare_loop(calibrated: Engine) -> None:
    conditioning = tiny_conditioning(calibrated.pipeline.transformer)
    arguments: dict[str, Any] = {**conditioning, "num_inference_steps": 8}
    calibrated.denoise(noise(1, 4, 16, 16), patch_policy="fast", **arguments)
    assert calibrated.last_trace is not None
    assert len(calibrated.last_trace) == 5


def test_preset_for_another_number_of_steps_is_refused(calibrated: Engine) -> None:
    with pytest.raises(ValueError, match=r"for 9 steps .* only for \[8\] steps"):
        call(calibrated, num_inference_steps=9, patch_policy="balanced")
    # The pipeline's own default.
    with pytest.raises(ValueError, match="for 28 steps"):
        call(calibrated, patch_policy=0.5)


def test_preset_without_calibration_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not calibrated at all; run `ddit-rt calibrate"):
        call(engine, num_inference_steps=8, patch_policy="balanced")


def test_fewer_steps_do_not_fit_given_sigmas(calibrated: Engine) -> None:
    sigmas = [1 - index / 8 for index in range(8)]
    call(calibrated, sigmas=sigmas, num_inference_steps=8, patch_policy="balanced")
    with pytest.raises(ValueError, match="leave `sigmas` out"):
        call(calibrated, sigmas=sigmas, num_inference_steps=8, patch_policy="fast")


@pytest.mark.parametrize("choice", [True, ["p"], {}])
def test_choice_of_another_type_is_refused(calibrated: Engine, choice: Any) -> None:
    with pytest.raises(TypeError, match="pass a policy such as"):
        call(calibrated, num_inference_steps=8, patch_policy=choice)
