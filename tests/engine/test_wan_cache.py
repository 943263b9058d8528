"""Step caches on Wan: against TeaCache over diffusers' own pipeline, with guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig
from reference_teacache import ReferenceWanTeaCache
from wan_models import euler, heun, unipc, wan_pipeline

import ddit_rt
from ddit_rt import FinePolicy, MagCache, StaticPolicy, TeaCache
from ddit_rt.loop import RunTrace

STEPS = 12
IDENTITY = (1.0, 0.0)
CALL = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "height": 64,
    "width": 128,
    "num_frames": 9,
    "num_inference_steps": STEPS,
    "max_sequence_length": 12,
    "output_type": "latent",
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def eager(scheduler: Any) -> ddit_rt.Engine:
    return ddit_rt.compile(wan_pipeline(scheduler), backend="eager", progress=False)


def trace_of(engine: ddit_rt.Engine) -> RunTrace:
    assert engine.last_trace is not None
    return engine.last_trace


@pytest.mark.parametrize("scheduler", [unipc, euler])
@pytest.mark.parametrize(("guidance_scale", "batched"), [(1.0, True), (5.0, True), (5.0, False)])
@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_equals_teacache_over_diffusers(
    scheduler: Any, guidance_scale: float, batched: bool, use_ret_steps: bool
) -> None:
    passes = 1 if guidance_scale == 1.0 else 2
    threshold = 0.8 if use_ret_steps else 1.5
    pipeline = wan_pipeline(scheduler())
    reference = ReferenceWanTeaCache(
        pipeline.transformer,
        threshold,
        IDENTITY,
        STEPS,
        passes=passes,
        use_ret_steps=use_ret_steps,
    )
    call = {**CALL, "guidance_scale": guidance_scale}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(scheduler())
    engine.batched_guidance = batched
    cache = TeaCache(threshold, coefficients=IDENTITY, use_ret_steps=use_ret_steps)
    actual = engine(**call, generator=seeded(), patch_policy=FinePolicy(), step_cache=cache).frames
    computed = [not record.reused for record in trace_of(engine)]
    assert [one for one in computed for _ in range(passes)] == reference.computed
    assert 2 < computed.count(False) < STEPS - 2
    # As without a cache.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_mag_cache_equals_diffusers_own(batched: bool) -> None:
    """diffusers gives each half a state of its own, by the cache contexts of its pipeline."""
    ratios = [1.0] + [0.97, 1.05, 0.99, 1.02] * 2 + [0.96, 1.04, 0.9]
    pipeline = wan_pipeline(euler())
    pipeline.transformer.enable_cache(
        MagCacheConfig(
            threshold=0.1,
            max_skip_steps=2,
            retention_ratio=0.2,
            num_inference_steps=STEPS,
            mag_ratios=ratios,
        )
    )
    call = {**CALL, "guidance_scale": 5.0}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(euler())
    engine.batched_guidance = batched
    cache = MagCache(threshold=0.1, max_skip_steps=2, mag_ratios=ratios)
    actual = engine(**call, generator=seeded(), patch_policy=FinePolicy(), step_cache=cache).frames
    assert 2 < trace_of(engine).reused < STEPS - 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("use_ret_steps", "threshold"), [(False, 1.5), (True, 0.8)])
def test_teacache_counts_the_two_calls_of_a_heun_step(
    use_ret_steps: bool, threshold: float
) -> None:
    """As published: it sees calls of the model, not noise levels.

    Time stands still between the calls at one level, so there only the constant term is added.
    """
    coefficients, calls = (1.0, 0.1), 2 * STEPS - 1
    pipeline = wan_pipeline(heun())
    reference = ReferenceWanTeaCache(
        pipeline.transformer, threshold, coefficients, calls, passes=2, use_ret_steps=use_ret_steps
    )
    call = {**CALL, "guidance_scale": 5.0}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(heun())
    cache = TeaCache(threshold, coefficients=coefficients, use_ret_steps=use_ret_steps)
    actual = engine(**call, generator=seeded(), patch_policy=FinePolicy(), step_cache=cache).frames
    computed = [not record.reused for record in trace_of(engine)]
    assert len(computed) == calls
    assert [one for one in computed for _ in range(2)] == reference.computed
    assert 2 < computed.count(False) < calls - 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_mag_cache_takes_a_ratio_for_each_call_of_a_heun_step() -> None:
    calls = 2 * STEPS - 1
    ratios = [1.0] + [0.97, 1.05, 0.99, 1.02] * 5 + [0.96, 1.04]
    config = {"threshold": 0.1, "max_skip_steps": 2, "retention_ratio": 0.2, "mag_ratios": ratios}
    pipeline = wan_pipeline(heun())
    pipeline.transformer.enable_cache(MagCacheConfig(num_inference_steps=calls, **config))
    call = {**CALL, "guidance_scale": 5.0}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(heun())
    cache = MagCache(**config)
    actual = engine(**call, generator=seeded(), patch_policy=FinePolicy(), step_cache=cache).frames
    assert 2 < trace_of(engine).reused < calls - 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batched", [True, False])
def test_coarse_steps_reuse_with_guidance(batched: bool) -> None:
    engine = eager(euler())
    engine.batched_guidance = batched
    plan = StaticPolicy(["p", "p", "2p", "2p", "2p", "p", "p", "4p", "4p", "p", "p", "p"])
    cache = TeaCache(1e9, coefficients=IDENTITY)
    result = engine(**CALL, generator=seeded(), patch_policy=plan, step_cache=cache)
    assert torch.isfinite(result.frames).all()
    reused = "".join("r" if record.reused else "c" for record in trace_of(engine))
    assert reused == "crcrrcrcrcrc"


def test_guidance_modes_agree_on_reused_steps() -> None:
    engine, finals = eager(euler()), []
    cache = TeaCache(1.5, coefficients=IDENTITY)
    for batched in (True, False):
        engine.batched_guidance = batched
        plan = StaticPolicy("2p:0.5,p")
        finals.append(
            engine(**CALL, generator=seeded(), patch_policy=plan, step_cache=cache).frames
        )
        assert trace_of(engine).reused > 0
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-4)


def test_a_model_without_a_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no teacache-ret coefficients for this WanTransformer3D"):
        eager(euler())(**CALL, step_cache=TeaCache(0.1, use_ret_steps=True))
