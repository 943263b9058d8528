"""Step caches that need no fit: SeaCache against diffusers' own hook, and plans of any family."""

from __future__ import annotations

from typing import Any

import pytest
import qwen_models
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, SeaCacheConfig
from diffusers.hooks import sea_cache
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from driving import FINE, pattern, replace_prompt, trace_of
from models import eager, noise, seeded, tiny_conditioning, tiny_embeds
from models import tiny_pipeline as flux_pipeline
from wan_models import CALL as WAN
from wan_models import unipc, wan_pipeline

from ddit_rt import (
    FirstBlockCache,
    MagCache,
    NoCache,
    SeaCache,
    StaticCache,
    StaticPolicy,
    StepCache,
)
from ddit_rt.errors import UnsupportedModelError

STEPS = 12
SIZE = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
FLUX: dict[str, Any] = {**tiny_embeds(), **SIZE}
QWEN: dict[str, Any] = {**qwen_models.tiny_embeds(), **SIZE, "true_cfg_scale": 1.0}
CALL = {**WAN, "negative_prompt": "a dog", "num_inference_steps": STEPS}


def even() -> FlowMatchEulerDiscreteScheduler:
    """Noise levels at equal distances, on which steps and levels extrapolate alike."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


@pytest.mark.parametrize(
    ("order", "scale", "batched"), [(0, 1.0, True), (0, 5.0, True), (1, 5.0, False)]
)
def test_sea_cache_equals_diffusers_own(
    monkeypatch: pytest.MonkeyPatch, order: int, scale: float, batched: bool
) -> None:
    """Its hook keeps a state for each pass of guidance; the latents are those of both."""
    fields = {"threshold": 0.3, "residual_order": order, "retention_steps": 2}
    decisions: list[bool] = []
    own = sea_cache.SeaCacheSharedState.resolve_gate

    def resolve_gate(*arguments: Any) -> bool:
        decisions.append(own(*arguments))
        return decisions[-1]

    monkeypatch.setattr(sea_cache.SeaCacheSharedState, "resolve_gate", resolve_gate)
    pipeline = wan_pipeline(even())
    pipeline.transformer.enable_cache(SeaCacheConfig(**fields))
    call = {**CALL, "guidance_scale": scale}
    expected = pipeline(**call, generator=seeded()).frames
    engine = eager(wan_pipeline(even()))
    engine.batched_guidance = batched
    cache = SeaCache(**fields)
    actual = engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache).frames
    passes = 1 if scale == 1.0 else 2
    computed = [not record.reused for record in trace_of(engine)]
    assert [one for one in computed for _ in range(passes)] == decisions
    assert 2 < computed.count(False) < STEPS - 4
    # As without a cache.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "flux driven", "wan", "qwen", "qwen driven"])
def test_first_block_cache_equals_diffusers_own(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Of models whose layers the family tells, with one or two kinds of blocks, and of one that
    runs by its own forward; driven by the pipeline, with a prompt that changes on the way.
    """
    name, _, driven = family.partition(" ")
    make, call, threshold = {
        "flux": (flux_pipeline, FLUX, 0.55),
        "wan": (wan_pipeline, {**CALL, "guidance_scale": 1.0}, 0.07),
        "qwen": (qwen_models.tiny_pipeline, QWEN, 0.7),
    }[name]
    if driven:
        tensors = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        call = {**call, "callback_on_step_end": replace_prompt, **tensors}
    decisions: list[bool] = []
    own = FBCHeadBlockHook._should_compute_remaining_blocks

    def should_compute(*arguments: Any) -> bool:
        decisions.append(own(*arguments))
        return decisions[-1]

    monkeypatch.setattr(FBCHeadBlockHook, "_should_compute_remaining_blocks", should_compute)
    pipeline = make()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold))
    expected = pipeline(**call, generator=seeded())[0]
    engine = eager(make())
    cache = FirstBlockCache(threshold)
    actual = engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache)[0]
    computed = [not record.reused for record in trace_of(engine)]
    assert computed == decisions
    assert 2 < computed.count(False) < STEPS - 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_first_block_that_adds_nothing_has_not_changed() -> None:
    pipeline = flux_pipeline()
    block = pipeline.transformer.transformer_blocks[0]
    for norm in (block.norm1, block.norm1_context):
        for parameter in norm.linear.parameters():
            torch.nn.init.zeros_(parameter)
    engine = eager(pipeline)
    engine(**FLUX, generator=seeded(), patch_policy=FINE, step_cache=FirstBlockCache(0.1))
    assert pattern(trace_of(engine)) == "c" + "r" * (STEPS - 1)
    assert not trace_of(engine).nonfinite


def test_a_static_plan_reuses_as_it_says_at_any_step_and_size() -> None:
    engine = eager(flux_pipeline())
    start = noise(1, 4, 16, 16)
    conditioning = tiny_conditioning(engine.pipeline.transformer)

    def run(cache: StepCache, plan: str = "p") -> str:
        engine.denoise(
            start, num_inference_steps=STEPS, step_cache=cache, patch_policy=StaticPolicy(plan),
            **conditioning,
        )  # fmt: skip
        return pattern(trace_of(engine))

    assert run(StaticCache(2)) == "cccrcrcrcrcc"
    assert run(StaticCache(3, first=1, last=0)) == "crrcrrcrrcrr"
    assert run(StaticCache(2, first=1), "2p:0.42,p") == "crcrcccrcrcc"
    assert run(StaticCache([True] * 4 + [False] * 8)) == "ccccrrrrrrrc"
    note = "step cache: StaticCache, 7 of 12 steps reuse, residuals extrapolated"
    assert note in trace_of(engine).notes


@pytest.mark.parametrize(
    ("cache", "driven"),
    [(SeaCache(0.5), True), (FirstBlockCache(0.7), True), (StaticCache(2), False)],
)
def test_a_family_that_does_not_tell_its_layers_has_them(cache: StepCache, driven: bool) -> None:
    pipeline = qwen_models.tiny_pipeline()
    engine = eager(pipeline)
    call = dict(QWEN)
    if driven:
        call["callback_on_step_end"] = lambda *_: {}
    finals = [
        engine(**call, generator=seeded(), patch_policy=FINE, step_cache=one).images
        for one in (cache, NoCache(), cache)
    ]
    assert torch.equal(finals[0], finals[2])
    assert 2 < trace_of(engine).reused < STEPS - 3
    assert trace_of(engine).executor == ("pipeline-cpu" if driven else "cpu")
    difference = (finals[0] - finals[1]).abs().max() / finals[1].abs().max()
    assert 1e-6 < float(difference) < 0.5


@pytest.mark.parametrize(("cache", "driven"), [(SeaCache(9.0), False), (StaticCache(2), True)])
def test_experts_that_take_turns_have_them(cache: StepCache, driven: bool) -> None:
    """The first step of an expert computes, since what the other left is not its own."""
    engine = eager(wan_pipeline(unipc(), boundary_ratio=0.8))
    call: dict[str, Any] = {**CALL, "guidance_scale": 4.0}
    if driven:
        call["callback_on_step_end"] = lambda *_: {}
    engine(**call, generator=seeded(), patch_policy=FINE, step_cache=cache)
    trace = trace_of(engine)
    assert trace.reused > 2
    (switch,) = (int(n.split()[1]) for n in trace.notes if n.endswith(": expert 2"))
    assert trace[switch].cache_reason == "computed: forced"
    for of_one_model in (MagCache(), FirstBlockCache()):
        with pytest.raises(UnsupportedModelError, match=r"Cache .*2 experts.*SeaCache\(\)"):
            engine(**call, step_cache=of_one_model)


def test_a_plan_of_other_steps_is_refused_before_anything_runs() -> None:
    engine = eager(wan_pipeline())
    with pytest.raises(ValueError, match="a plan of 3 steps and the run has 12; give one"):
        engine(**CALL, step_cache=StaticCache([True, False, True]))
    assert engine.last_trace is None
