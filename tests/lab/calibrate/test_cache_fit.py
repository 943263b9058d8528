"""Fits of step caches: against diffusers' own measurement, closed forms, and in use."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MagCacheConfig
from models import prompting_pipeline
from wan_models import euler, wan_pipeline

import ddit_rt
from ddit_rt import FinePolicy, MagCache, TeaCache
from ddit_rt.lab.calibrate import Prompt
from ddit_rt.lab.calibrate.cache_fit import (
    StepChanges,
    _polynomial,
    _ratios,
    fit_cache,
    measuring_plan,
    watch,
)
from ddit_rt.policies import CacheFit

STEPS = 12
CALL = {"height": 64, "width": 64, "num_inference_steps": STEPS}
PROMPTS = [Prompt(text=text, seed=seed) for seed, text in enumerate(["a zebra", "a fox", "a cat"])]
WAN_CALL = {
    "height": 64,
    "width": 128,
    "num_frames": 9,
    "num_inference_steps": STEPS,
    "max_sequence_length": 12,
}


def eager() -> ddit_rt.Engine:
    return ddit_rt.compile(prompting_pipeline(), backend="eager", progress=False)


def fit(engine: ddit_rt.Engine, kind: str, call: dict[str, Any] = CALL) -> CacheFit:
    return fit_cache(engine, kind, PROMPTS, arguments=call, conditions={"versions": {"torch": "x"}})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_watch_measures_what_a_run_decides_by() -> None:
    engine = eager()
    plan, latents = measuring_plan(engine, prompt="a zebra", generator=seeded(), **CALL)
    changes = watch(plan, latents)
    never = TeaCache(0.0, coefficients=(1.0, 0.0), last=0)
    engine("a zebra", generator=seeded(), **CALL, patch_policy=FinePolicy(), step_cache=never)
    assert engine.last_trace is not None
    accumulated = [record.accumulated for record in engine.last_trace]
    assert list(changes.inputs) == pytest.approx(accumulated[1:], rel=1e-5)
    assert len(changes.outputs) == len(changes.ratios) == STEPS - 1


def diffusers_ratios(pipeline: Any, capsys: pytest.CaptureFixture[str], **call: Any) -> list[Any]:
    """What diffusers prints when it calibrates MagCache, a list per pass of a step."""
    pipeline.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    capsys.readouterr()
    pipeline(**call, output_type="latent")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    return [ast.literal_eval(line) for line in lines]


def test_ratios_equal_those_of_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    call = {**CALL, "prompt": "a zebra", "generator": seeded()}
    (expected,) = diffusers_ratios(prompting_pipeline(), capsys, **call)
    plan, latents = measuring_plan(eager(), **{**call, "generator": seeded()})
    assert [1.0, *watch(plan, latents).ratios] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_ratios_with_guidance_are_the_mean_over_both_passes(
    capsys: pytest.CaptureFixture[str], batched: bool
) -> None:
    call = {**WAN_CALL, "prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 4.0}
    halves = diffusers_ratios(wan_pipeline(euler()), capsys, **call, generator=seeded())
    assert len(halves) == 2
    engine = ddit_rt.compile(wan_pipeline(euler()), backend="eager", progress=False)
    engine.batched_guidance = batched
    plan, latents = measuring_plan(engine, **call, generator=seeded())
    expected = np.mean(halves, axis=0).tolist()
    assert [1.0, *watch(plan, latents).ratios] == pytest.approx(expected, rel=1e-4)


def test_polynomial_is_recovered() -> None:
    wanted = (3.0, -2.0, 1.0, 0.5, 0.1)
    inputs = [tuple(np.linspace(0.05, 0.4, 6)), tuple(np.linspace(0.1, 0.5, 6))]
    runs = [
        StepChanges(inputs=x, outputs=tuple(np.polyval(wanted, x)), ratios=(1.0,) * 6)
        for x in inputs
    ]
    values, evidence = _polynomial(runs)
    assert values == pytest.approx(wanted, rel=1e-6)
    assert evidence["residual_rms"] < 1e-9
    assert evidence["inputs"] == [0.05, 0.5]
    assert evidence["points"] == 12


def test_ratios_are_means_and_their_spread_is_told() -> None:
    runs = [
        StepChanges(inputs=(), outputs=(), ratios=ratios) for ratios in ((0.8, 1.0), (1.0, 1.0))
    ]
    values, evidence = _ratios(runs)
    assert values == pytest.approx((1.0, 0.9, 1.0))
    assert evidence == {"mean_deviation_between_prompts": pytest.approx(0.05)}


@pytest.mark.parametrize("kind", ["teacache", "magcache"])
def test_a_fit_makes_its_cache_run(kind: str) -> None:
    engine = eager()
    found = fit(engine, kind)
    assert len(found.values) == (5 if kind == "teacache" else STEPS)
    assert found.source == "fitted on this model: 3 prompts, 12 steps"
    assert found.evidence["prompts"] == [[prompt.text, prompt.seed] for prompt in PROMPTS]
    assert found.evidence["num_inference_steps"] == STEPS
    assert found.evidence["versions"] == {"torch": "x"}
    cache = TeaCache(0.3) if kind == "teacache" else MagCache(threshold=0.3)
    call = {**CALL, "prompt": "a vase", "generator": seeded(), "step_cache": cache}
    with pytest.raises(ValueError, match=f"no {kind}"):
        engine(**call)
    engine.artifact = engine.artifact.with_cache_fit(found)
    engine(**call, patch_policy=FinePolicy())
    assert engine.last_trace is not None
    assert 0 < engine.last_trace.reused < STEPS - 1
    assert "fitted on this model: 3 prompts" in engine.last_trace.notes[-1]


@pytest.mark.parametrize("kind", ["teacache", "teacache-ret"])
def test_wan_is_fitted_by_its_time_embedding(kind: str) -> None:
    engine = ddit_rt.compile(wan_pipeline(euler()), backend="eager", progress=False)
    found = fit(engine, kind, WAN_CALL)
    assert found.evidence["points"] == 3 * (STEPS - 1)
    engine.artifact = engine.artifact.with_cache_fit(found)
    cache = TeaCache(1.0, use_ret_steps=kind == "teacache-ret")
    engine("a cat", **WAN_CALL, step_cache=cache, output_type="latent")
    assert engine.last_trace is not None
    assert engine.last_trace.reused > 0


def test_what_cannot_be_fitted_is_refused() -> None:
    engine = eager()
    with pytest.raises(ValueError, match="use_ret_steps=True for a FluxTransformer2DModel"):
        fit(engine, "teacache-ret")
    with pytest.raises(ValueError, match="calibrate with more steps"):
        fit_cache(
            engine,
            "teacache",
            PROMPTS[:1],
            arguments={**CALL, "num_inference_steps": 5},
            conditions={},
        )
    with pytest.raises(ValueError, match="got the cache 'tea'"):
        fit(engine, "tea")
