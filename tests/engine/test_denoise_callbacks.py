"""`Engine.denoise` with a callback, or a scheduler that is no table: it takes its own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from driving import FINE, assert_equal, trace_of
from models import eager, noise, seeded, tiny_conditioning, tiny_embeds, tiny_pipeline
from torch import Tensor
from wan_models import heun, unipc, wan_conditioning, wan_pipeline

from ddit_rt import DDiTPolicy, Engine, PatchPolicy, StaticPolicy
from ddit_rt.errors import RunCancelled, ShapeError

SHAPE = (1, 4, 16, 16)
STEPS = 6
Callback = Callable[[int, Tensor], Tensor | None]


def euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def stochastic() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)


def dpm() -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return eager(tiny_pipeline())


def denoise(engine: Engine, policy: PatchPolicy = FINE, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": STEPS, "patch_policy": policy, **arguments}
    return engine.denoise(noise(*SHAPE), **given, **tiny_conditioning(engine.pipeline.transformer))


def loop_of(engine: Engine, scheduler: Any, callback: Callback | None) -> Tensor:
    """The same with diffusers' own transformer and scheduler."""
    family, transformer = engine._compiled.steps.family, engine.pipeline.transformer
    grid = engine._compiled.steps.grid(*SHAPE[-2:])
    family.set_timesteps(scheduler, STEPS, None, grid)
    scheduler.set_begin_index(0)
    latents, given = noise(*SHAPE), tiny_conditioning(transformer)
    tokens = given["encoder_hidden_states"].shape[1]
    ids = engine.pipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    for step, timestep in enumerate(scheduler.timesteps):
        packed = transformer(
            hidden_states=family.pack_latents(latents),
            timestep=timestep[None] / 1000,
            txt_ids=torch.zeros(tokens, 3),
            img_ids=ids,
            return_dict=False,
            **given,
        )[0]
        velocity = family.unpack_latents(packed, SHAPE)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        replaced = None if callback is None else callback(step, latents)
        latents = latents if replaced is None else replaced
    return latents


def edit(step: int, latents: Tensor) -> None:
    if step in (1, 2, STEPS - 1):
        latents.mul_(0.5)


def replace(step: int, latents: Tensor) -> Tensor | None:
    return latents.roll(1, -1) * 0.7 if step in (1, 2, STEPS - 1) else None


@pytest.mark.parametrize(
    ("make", "callback"), [(euler, edit), (unipc, edit), (unipc, replace), (dpm, replace)]
)
def test_a_callback_may_edit_or_replace_the_latents(
    engine: Engine, make: Callable[[], Any], callback: Callback
) -> None:
    """Also under a corrector, which goes on from latents of its own."""
    actual = denoise(engine, scheduler=make(), callback=callback)
    assert_equal(actual, loop_of(engine, make(), callback), tolerance=2e-6)
    assert trace_of(engine).executor == "scheduler-cpu"
    assert trace_of(engine).notes[-1].endswith("own steps: a callback comes between them")


@pytest.mark.parametrize(
    ("make", "policy"),
    [
        (dpm, FINE),
        (euler, StaticPolicy(["p", "2p", "4p", "p", "2p", "2p"])),
        (unipc, DDiTPolicy(tau=1.0, fine_tail=1)),
    ],
)
def test_a_callback_that_changes_nothing_changes_nothing(
    engine: Engine, make: Callable[[], Any], policy: PatchPolicy
) -> None:
    table = denoise(engine, policy, scheduler=make())
    expected = trace_of(engine).patch_sizes()
    seen: list[tuple[int, Tensor]] = []
    final = denoise(
        engine, policy, scheduler=make(), callback=lambda k, z: seen.append((k, z.clone()))
    )
    assert trace_of(engine).patch_sizes() == expected
    assert_equal(final, table, tolerance=2e-6)
    assert [step for step, _ in seen] == list(range(STEPS))
    assert torch.equal(seen[-1][1], final)


def test_a_scheduler_that_draws_noise_takes_its_own_steps() -> None:
    engine = eager(tiny_pipeline())
    torch.manual_seed(0)
    expected = loop_of(engine, stochastic(), None)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="scheduler's own steps: .* it draws noise") as warned:
        actual = denoise(engine, scheduler=stochastic())
    assert [warning.filename for warning in warned] == [__file__]
    assert_equal(actual, expected)
    denoise(engine, scheduler=stochastic())  # said once


def test_latents_of_another_shape_are_refused(engine: Engine) -> None:
    with pytest.raises(ShapeError, match=r"shape \[4, 16, 16\]; expected \[1, 4, 16, 16\]"):
        denoise(engine, callback=lambda _, latents: latents[0])


def test_scores_over_repeated_noise_levels_are_refused() -> None:
    wan = eager(wan_pipeline(heun()))
    with pytest.raises(ValueError, match="FlowMatchHeun.*visits each noise level twice"):
        wan.denoise(noise(1, 4, 3, 16, 16), callback=lambda *_: None, **wan_conditioning())


def test_cancel_ends_the_run(engine: Engine) -> None:
    def cancel(step: int, latents: Tensor) -> None:
        if step == 2:
            engine.cancel()

    with pytest.raises(RunCancelled, match=f"after 3 of {STEPS} steps"):
        denoise(engine, callback=cancel)
    assert len(trace_of(engine)) == 3
    assert len(denoise(engine)) == 1


def test_an_interrupted_call_before_does_not_end_the_run(engine: Engine) -> None:
    """The flag is the pipeline's call's own, and diffusers leaves it standing."""

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        pipe._interrupt = True
        return tensors

    call = {**tiny_embeds(), "num_inference_steps": 3, "output_type": "latent"}
    engine(**call, height=64, width=64, generator=seeded(), callback_on_step_end=stop)
    denoise(engine)
    assert len(trace_of(engine)) == STEPS
