"""Wan driven by its pipeline's own loop, beside diffusers' own transformers in it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from driving import CALLBACKS, FINE, assert_equal, keep, latents_of, runs, trace_of
from models import eager, noise, seeded
from torch import Tensor
from wan_models import CALL, euler, heun, in_half_precision, unipc, wan_pipeline

from ddit_rt import DDiTPolicy, MagCache, PatchPolicy, StaticPolicy
from ddit_rt.errors import UnsupportedModelError


@pytest.mark.parametrize("place", range(len(CALLBACKS)), ids=CALLBACKS)
def test_every_callback_does_what_it_does_in_diffusers(place: int) -> None:
    """Guided, so with two calls of the transformer in a step; of Heun's, two in a level."""
    callback, scheduler = list(CALLBACKS.values())[place], (heun, unipc, euler)[place % 3]
    pipeline = wan_pipeline(scheduler())
    engine = eager(pipeline)
    assert_equal(*runs(pipeline, engine, {**CALL, "negative_prompt": "a dog"}, **callback))
    assert trace_of(engine).executor == "pipeline-cpu"
    assert trace_of(engine).solver == type(pipeline.scheduler).__name__


def set_scale(scale: float, at: int) -> Any:
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        if step == at:
            pipe._guidance_scale = scale
        return tensors

    return callback


@pytest.mark.parametrize(
    ("scheduler", "names"), [(euler, ["latents"]), (unipc, []), (heun, ["latents"])]
)
def test_guidance_may_end_in_the_middle(scheduler: Any, names: list[str]) -> None:
    """Also by a callback that asks for no tensors: it has the pipeline."""
    pipeline = wan_pipeline(scheduler())
    engine = eager(pipeline)
    callback = {"callback_on_step_end_tensor_inputs": names}
    callback["callback_on_step_end"] = set_scale(0.0, at=2)
    actual, expected = runs(pipeline, engine, CALL, **callback)
    assert_equal(actual, expected)
    assert not torch.equal(expected, latents_of(pipeline(**CALL, generator=seeded())))


def test_guidance_may_begin_in_the_middle_where_there_is_a_negative_prompt() -> None:
    pipeline = wan_pipeline(euler())
    embeds = {"prompt_embeds": noise(1, 12, 24, seed=1)}
    embeds["negative_prompt_embeds"] = noise(1, 12, 24, seed=2)
    call = {**CALL, **embeds, "prompt": None, "guidance_scale": 1.0}
    callback = set_scale(4.0, at=2)
    assert_equal(*runs(pipeline, eager(pipeline), call, callback_on_step_end=callback))


@pytest.mark.parametrize("change", ["in place", "returned"])
def test_both_prompts_may_change(change: str) -> None:
    pipeline = wan_pipeline()

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        if step not in (2, 3, 5):
            return {}
        if change == "returned":
            return {name: tensor + 1 for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.mul_(0.5)
        return {}

    names = ["prompt_embeds", "negative_prompt_embeds"]
    call = {**CALL, "callback_on_step_end_tensor_inputs": names}
    assert_equal(*runs(pipeline, eager(pipeline), call, callback_on_step_end=callback))


@pytest.mark.parametrize("callback", ["other latents", "in-place prompt", "cut-off object"])
def test_two_experts_take_turns_as_in_diffusers(callback: str) -> None:
    pipeline = wan_pipeline(unipc(), boundary_ratio=0.8)
    engine = eager(pipeline)
    call = {**CALL, "guidance_scale_2": 2.0}
    assert_equal(*runs(pipeline, engine, call, **CALLBACKS[callback]))
    assert "steps 3 to 5: expert 2" in trace_of(engine).notes


@pytest.mark.parametrize(
    ("policy", "scheduler", "boundary_ratio"),
    [
        (FINE, unipc, 0.8),
        (StaticPolicy(["p", "2p", "4p", "p", "2p", "2p"]), euler, 0.8),
        (DDiTPolicy(tau=1.0, fine_tail=1), unipc, None),
        (DDiTPolicy(tau=1.0, fine_tail=1), euler, 0.8),
    ],
)
def test_a_callback_that_changes_nothing_changes_nothing(
    policy: PatchPolicy, scheduler: Any, boundary_ratio: float | None
) -> None:
    """The policy's history is of latents of successive steps, and each pass keeps its detail."""
    engine = eager(wan_pipeline(scheduler(), boundary_ratio=boundary_ratio))
    call = {**CALL, "height": 128, "patch_policy": policy}
    table = latents_of(engine(**call, generator=seeded()))
    expected = trace_of(engine)
    driven = latents_of(engine(**call, generator=seeded(), callback_on_step_end=keep))
    assert trace_of(engine).patch_sizes() == expected.patch_sizes()
    assert [r.reason for r in trace_of(engine)] == [r.reason for r in expected]
    for ours, theirs in zip(trace_of(engine), expected, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-3)
    assert_equal(driven, table, tolerance=2e-6)


def test_scores_over_repeated_noise_levels_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = wan_pipeline(heun())
    engine = eager(pipeline)
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler visits.*StaticPolicy"):
        engine(**{**CALL, "height": 128}, callback_on_step_end=keep)
    assert engine.last_trace is None


@pytest.mark.parametrize(
    ("callback", "scheduler"),
    [("in-place latents", euler), ("in-place latents", unipc), ("other prompt", unipc)],
)
def test_half_precision_has_the_dtypes_of_diffusers(callback: str, scheduler: Any) -> None:
    pipeline = in_half_precision(wan_pipeline(scheduler()))
    actual, expected = runs(pipeline, eager(pipeline), CALL, **CALLBACKS[callback])
    # bf16 keeps 8 bits; guidance multiplies that error of the velocities.
    assert_equal(actual, expected, tolerance=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "boundary_ratio"), [(euler, None), (unipc, 0.8)])
def test_half_precision_does_not_blind_the_policy(
    scheduler: Any, boundary_ratio: float | None
) -> None:
    """UniPC's latents are float32, and rounded for the transformer alone; Euler's are bfloat16."""
    pipeline = wan_pipeline(scheduler(), boundary_ratio=boundary_ratio)
    engine = eager(in_half_precision(pipeline))
    call = {**CALL, "height": 128, "num_inference_steps": 100, "guidance_scale_2": None}
    if boundary_ratio is not None:
        call["guidance_scale_2"] = 1.5
    call["patch_policy"] = DDiTPolicy.paper(tau=2e-3)
    engine(**call, generator=seeded())
    expected = trace_of(engine)
    engine(**call, generator=seeded(), callback_on_step_end=keep)
    sizes = trace_of(engine).patch_sizes()
    assert sizes.count("p") < 90
    # Until one choice at a threshold differs, and then the latents do. Rounded ones score 0.0035,
    # four times as much; how the velocities are rounded is the processor's, and moves a quarter.
    assert sizes[:15] == expected.patch_sizes()[:15]
    for ours, theirs in zip(trace_of(engine).steps[3:15], expected.steps[3:15], strict=True):
        assert ours.scores == pytest.approx(theirs.scores, rel=0.5)


def test_a_pass_takes_over_where_a_step_left_it_out() -> None:
    """Coarse steps after guidance has begun build on the unguided step at p before it."""
    engine = eager(wan_pipeline(euler()))
    plan = StaticPolicy(["2p", "p", "2p", "4p", "p", "2p"])
    call = {**CALL, "height": 128, "patch_policy": plan, "guidance_interval": (0.34, 1.0)}
    table = latents_of(engine(**call, generator=seeded()))
    driven = latents_of(engine(**call, generator=seeded(), callback_on_step_end=keep))
    assert_equal(driven, table)


def test_a_pass_that_comes_back_computes_before_it_reuses() -> None:
    """Nothing is ever reused that is older than the others' latest computed step."""
    engine = eager(wan_pipeline(euler()))
    cache = MagCache(threshold=1e9, mag_ratios=(1.0,) * 6, retention_ratio=0.1, max_skip_steps=5)
    call = {**CALL, "patch_policy": FINE, "step_cache": cache}
    scales = {0: 0.0, 2: 5.0}

    def toggle(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        pipe._guidance_scale = scales.get(step, pipe._guidance_scale)
        return tensors

    plan = StaticPolicy(["p", "2p", "2p", "2p", "2p", "2p"])
    final = latents_of(engine(**{**call, "patch_policy": plan}, callback_on_step_end=toggle))
    assert torch.isfinite(final).all()
    assert [r.reused for r in trace_of(engine)] == [False, False, True, True, True, True]
    assert "step 3: a pass that was left out before had nothing to reuse, and computed" in (
        trace_of(engine).notes
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        lambda: FlowMatchLCMScheduler(shift=3.0),
        lambda: SASolverScheduler.from_config(unipc().config),
        lambda: UniPCMultistepScheduler.from_config(unipc().config, solver_order=3),
        lambda: UniPCMultistepScheduler.from_config(unipc().config, disable_corrector=[2, 4]),
    ],
    ids=["stochastic", "lcm", "sa", "unipc of order 3", "corrector off"],
)
@pytest.mark.filterwarnings("ignore:driven by")
def test_schedulers_that_are_no_table_equal_diffusers(scheduler: Any) -> None:
    for callback in (CALLBACKS["in-place latents"], {}):
        pipeline = wan_pipeline(scheduler())
        engine = eager(pipeline)
        torch.manual_seed(0)
        actual = engine(**CALL, **callback, generator=seeded(), patch_policy=FINE)
        torch.manual_seed(0)
        expected = pipeline(**CALL, **callback, generator=seeded())
        # Solvers of third order amplify rounding: 1.6e-6 on a processor of AMD, less than 1e-6 on
        # one of Intel.
        assert_equal(latents_of(actual), latents_of(expected), tolerance=4e-6)


def test_prompts_of_unequal_length_are_run() -> None:
    pipeline = wan_pipeline(euler())
    call = {**CALL, "negative_prompt_embeds": noise(1, 5, 24, seed=2)}
    assert_equal(*runs(pipeline, eager(pipeline), call, callback_on_step_end=keep))


def test_another_pass_than_was_planned_is_refused() -> None:
    engine = eager(wan_pipeline(euler()))
    call = {**CALL, "guidance_scale": 1.0, "callback_on_step_end": set_scale(5.0, at=1)}
    with pytest.raises(UnsupportedModelError, match="planned for 1 of them: ask for guidance"):
        engine(**call)


def test_a_loop_that_does_not_call_the_model_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = wan_pipeline(euler())
    engine = eager(pipeline)

    @functools.wraps(WanPipeline.__call__)
    def older(self: Any, **arguments: Any) -> None:
        latents, timestep = torch.zeros(1, 4, 3, 8, 16), torch.zeros(1)
        arguments["callback_on_step_end"](self, 0, timestep, {"latents": latents})

    monkeypatch.setattr(WanPipeline, "__call__", older)
    with pytest.raises(UnsupportedModelError, match="WanPipeline ended step 0 without a call"):
        engine(**CALL, callback_on_step_end=keep)
