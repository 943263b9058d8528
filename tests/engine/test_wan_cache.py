"""Step caches on Wan: against TeaCache over diffusers' own pipeline, with guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig
from driving import FINE, pattern, trace_of
from models import eager, seeded
from reference_teacache import ReferenceWanTeaCache
from wan_models import CALL as WAN
from wan_models import euler, heun, unipc, wan_pipeline

from ddit_rt import MagCache, StaticPolicy, TeaCache

STEPS = 12
IDENTITY = (1.0, 0.0)
CALL = {**WAN, "negative_prompt": "a dog", "num_inference_steps": STEPS}


def calls_of(scheduler: Any) -> int:
    """Calls of the model in a run: Heun's has two at every noise level but the first."""
    return 2 * STEPS - 1 if scheduler is heun else STEPS


@pytest.mark.parametrize("use_ret_steps", [False, True])
@pytest.mark.parametrize(
    ("scheduler", "guidance_scale", "batched"),
    [(unipc, 5.0, True), (euler, 5.0, False), (euler, 1.0, True), (heun, 5.0, True)],
)
def test_equals_teacache_over_diffusers(
    scheduler: Any, guidance_scale: float, batched: bool, use_ret_steps: bool
) -> None:
    """As published, it sees calls of the model, not noise levels.

    Time stands still between Heun's calls at one level, so there only the constant term is added.
    """
    passes, calls = 1 if guidance_scale == 1.0 else 2, calls_of(scheduler)
    threshold = 0.8 if use_ret_steps else 1.5
    coefficients = (1.0, 0.1) if scheduler is heun else IDENTITY
    pipeline = wan_pipeline(scheduler())
    reference = ReferenceWanTeaCache(
        pipeline.transformer,
        threshold,
        coefficients,
        calls,
        passes=passes,
        use_ret_steps=use_ret_steps,
    )
    call = {**CALL, "guidance_scale": guidance_scale}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(wan_pipeline(scheduler()))
    engine.batched_guidance = batched
    cache = TeaCache(threshold, coefficients=coefficients, use_ret_steps=use_ret_steps)
    actual = engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache).frames
    computed = [not record.reused for record in trace_of(engine)]
    assert len(computed) == calls
    assert [one for one in computed for _ in range(passes)] == reference.computed
    assert 2 < computed.count(False) < calls - 2
    # As without a cache.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scheduler", "batched"), [(euler, True), (euler, False), (heun, True)])
def test_mag_cache_equals_diffusers_own(scheduler: Any, batched: bool) -> None:
    """diffusers gives each half a state of its own, by the cache contexts of its pipeline."""
    calls = calls_of(scheduler)
    ratios = [1.0, *([0.97, 1.05, 0.99, 1.02] * 6)[: calls - 4], 0.96, 1.04, 0.9]
    config = {"threshold": 0.1, "max_skip_steps": 2, "retention_ratio": 0.2, "mag_ratios": ratios}
    pipeline = wan_pipeline(scheduler())
    pipeline.transformer.enable_cache(MagCacheConfig(num_inference_steps=calls, **config))
    call = {**CALL, "guidance_scale": 5.0}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(wan_pipeline(scheduler()))
    engine.batched_guidance = batched
    cache = MagCache(**config)
    actual = engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache).frames
    assert 2 < trace_of(engine).reused < calls - 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_coarse_steps_reuse_alike_in_both_modes_of_guidance() -> None:
    engine, finals = eager(wan_pipeline(euler())), []
    plan = StaticPolicy(["p", "p", "2p", "2p", "2p", "p", "p", "4p", "4p", "p", "p", "p"])
    cache = TeaCache(1e9, coefficients=IDENTITY)
    for batched in (True, False):
        engine.batched_guidance = batched
        result = engine(**CALL, generator=seeded(), patch_policy=plan, step_cache=cache)
        finals.append(result.frames)
        assert pattern(trace_of(engine)) == "crcrrcrcrcrc"
    assert torch.isfinite(finals[0]).all()
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-4)


def test_a_model_without_a_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no teacache-ret coefficients for this WanTransformer3D"):
        eager(wan_pipeline())(**CALL, step_cache=TeaCache(0.1, use_ret_steps=True))
