"""The engine against diffusers' own pipeline, and what it does with everything else."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from diffusers.guiders import ClassifierFreeGuidance
from models import (
    noise,
    prompting_pipeline,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
    tiny_transformer,
)
from PIL import Image
from torch import Tensor

import ddit_rt
from ddit_rt import DDiTPolicy, Engine, FinePolicy, StaticPolicy, ops
from ddit_rt.errors import RunCancelled, ShapeError, UnsupportedModelError
from ddit_rt.families.base import Grid
from ddit_rt.families.flux import FluxFamily

FINE = FinePolicy()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(result: Any) -> Tensor:
    images = result.images
    assert isinstance(images, Tensor)
    return images


@pytest.mark.parametrize(
    ("height", "width", "batch", "steps"), [(64, 64, 1, 8), (64, 96, 3, 8), (32, 80, 3, 28)]
)
def test_all_fine_equals_diffusers(
    engine: Engine, pipeline: FluxPipeline, height: int, width: int, batch: int, steps: int
) -> None:
    call = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "latent"}
    embeds = tiny_embeds(batch)
    expected = latents_of(pipeline(**embeds, **call, generator=seeded()))
    actual = latents_of(engine(**embeds, **call, generator=seeded(), patch_policy=FINE))
    # fp32 throughout; compiled blocks round differently, latents are of order 4.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_all_fine_equals_diffusers_with_guidance_embeds() -> None:
    pipeline = tiny_pipeline(guidance_embeds=True)
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    call = {"height": 64, "width": 48, "num_inference_steps": 8, "output_type": "latent"}
    for scale in (1.0, 3.5):
        arguments = {**tiny_embeds(2), **call, "guidance_scale": scale}
        expected = latents_of(pipeline(**arguments, generator=seeded()))
        actual = latents_of(engine(**arguments, generator=seeded(), patch_policy=FINE))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_schedule_without_dynamic_shifting_equals_diffusers() -> None:
    pipeline = tiny_pipeline(dynamic_shifting=False)
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    call = {"height": 64, "width": 64, "sigmas": [1.0, 0.6, 0.3], "output_type": "latent"}
    call["num_inference_steps"] = 3
    expected = latents_of(pipeline(**tiny_embeds(), **call, generator=seeded()))
    actual = latents_of(engine(**tiny_embeds(), **call, generator=seeded(), patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plan", ["p", "4p:0.4,2p:0.4,p"])
def test_half_precision_follows_full_precision(plan: str) -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = tiny_pipeline().to(dtype)
        engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
        embeds = {name: value.to(dtype) for name, value in tiny_embeds().items()}
        latents = noise(1, 64, 16).to(dtype)
        result = engine(**embeds, **call, latents=latents, patch_policy=StaticPolicy(plan))
        assert latents_of(result).dtype == dtype
        results.append(latents_of(result).float())
    # bf16 keeps 8 bits: 0.4 % of velocities and latents of order 1 to 4.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.1)


def test_pictures_equal_diffusers(engine: Engine, pipeline: FluxPipeline) -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "num_images_per_prompt": 2}
    expected = pipeline(**tiny_embeds(), **call, generator=seeded()).images
    actual = engine(**tiny_embeds(), **call, generator=seeded(), patch_policy=FINE).images
    assert len(actual) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert isinstance(ours, Image.Image)
        # One level of 255: rounding of the last bit.
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_output_types_and_return_dict(engine: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 2}
    assert isinstance(engine(**call, output_type="pt").images, Tensor)
    assert engine(**call, output_type="np").images.shape == (1, 64, 64, 3)
    result = engine(**call, output_type="latent", return_dict=False)
    assert isinstance(result, tuple)


def test_given_latents_are_the_starting_point(engine: Engine, pipeline: FluxPipeline) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 3, "output_type": "latent"}
    start = noise(1, 64, 16)
    expected = latents_of(pipeline(**call, height=64, width=64, latents=start))
    actual = latents_of(engine(**call, latents=start, patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_denoise_equals_the_pipeline_call(engine: Engine) -> None:
    start = noise(2, 4, 16, 16)
    conditioning = tiny_conditioning(engine.pipeline.transformer, 2)
    loop = engine.denoise(start, num_inference_steps=5, **conditioning)
    packed = FluxPipeline._pack_latents(start, 2, 4, 16, 16)
    whole = latents_of(
        engine(**tiny_embeds(2), num_inference_steps=5, latents=packed, output_type="latent")
    )
    torch.testing.assert_close(FluxPipeline._pack_latents(loop, 2, 4, 16, 16), whole)


def test_bare_transformer_runs_its_loop_and_says_so() -> None:
    pipeline = tiny_pipeline()
    engine = ddit_rt.compile(pipeline.transformer, backend="eager", progress=False)
    conditioning = tiny_conditioning(pipeline.transformer)
    latents = engine.denoise(noise(1, 4, 16, 16), num_inference_steps=3, **conditioning)
    assert latents.shape == (1, 4, 16, 16)
    with pytest.raises(UnsupportedModelError, match=r"engine\.denoise"):
        engine("a cat")


def test_same_generator_gives_the_same_bits_whatever_ran_between(engine: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 9, "output_type": "latent"}
    policy = DDiTPolicy(tau=0.02, monotone=False)
    first = latents_of(engine(**call, generator=seeded(3), patch_policy=policy))
    engine(**tiny_embeds(2), num_inference_steps=4, height=64, width=96, generator=seeded(9))
    again = latents_of(engine(**call, generator=seeded(3), patch_policy=policy))
    assert torch.equal(first, again)


def test_adapters_and_policy_come_from_the_artifact(engine: Engine) -> None:
    engine(**tiny_embeds(), num_inference_steps=4)
    assert engine.default_policy == StaticPolicy("2p:0.5,p")
    assert engine.last_trace is not None
    assert engine.last_trace.patch_sizes() == ["2p", "2p", "p", "p"]
    methods = {entry.patch: entry.method for entry in engine.artifact.manifest.buckets}
    assert methods == {"p": "base", "2p": "adapter", "4p": "adapter"}


def test_height_and_width_default_to_those_compiled_for(engine: Engine) -> None:
    assert engine(**tiny_embeds(), num_inference_steps=1).images[0].size == (64, 64)
    assert engine(**tiny_embeds(), num_inference_steps=1, width=96).images[0].size == (96, 64)


def test_size_that_a_patch_does_not_divide_is_not_offered(engine: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 8, "height": 48, "width": 48}
    reason = "4p is not offered.*8 latent pixels do not divide 12 x"
    with pytest.warns(UserWarning, match=reason) as warned:
        engine(**call, patch_policy=DDiTPolicy(tau=1e9))
    assert [warning.filename for warning in warned] == [__file__]
    assert engine.last_trace is not None
    assert set(engine.last_trace.patch_sizes()) == {"2p", "p"}
    assert "4p is not offered" in engine.last_trace.notes[0]
    with pytest.raises(ShapeError, match=r"asks for 4p.*\['p', '2p'\]"):
        engine(**call, patch_policy=StaticPolicy("4p:0.5,p"))


def test_batch_outside_the_compiled_range_is_refused(engine: Engine) -> None:
    high = engine.artifact.manifest.ranges.batch[1]
    with pytest.raises(ShapeError, match=f"batch size of {high + 1}"):
        engine(**tiny_embeds(high + 1), num_inference_steps=1)


def test_too_small_a_picture_is_refused(engine: Engine) -> None:
    with pytest.raises(ShapeError, match="smallest picture is 8 x 8"):
        engine(**tiny_embeds(), height=4, width=64)


def test_nan_latents_are_refused(engine: Engine) -> None:
    start = noise(1, 64, 16)
    start[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        engine(**tiny_embeds(), latents=start)


def test_misshapen_latents_are_refused_with_both_shapes(engine: Engine) -> None:
    with pytest.raises(ShapeError, match=r"\[1, 60, 16\]; expected \[1, 64, 16\]"):
        engine(**tiny_embeds(), latents=noise(1, 60, 16))
    with pytest.raises(ShapeError, match=r"expected \[B, 4, H, W\]"):
        engine.denoise(noise(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "x"}, ValueError, r"unknown arguments \['prompts'\]"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, UnsupportedModelError, "would be ignored"),
        ({"ip_adapter_image": Image.new("RGB", (8, 8))}, UnsupportedModelError, "IP-Adapter"),
        ({"num_inference_steps": 0}, ValueError, "must be positive"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(
    engine: Engine, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine(**tiny_embeds(), **arguments)


@pytest.mark.parametrize(
    "kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler]
)
def test_solvers_with_dynamic_shifting_equal_diffusers(kind: Any) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = kind(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    call = {"height": 64, "width": 96, "num_inference_steps": 8, "output_type": "latent"}
    expected = latents_of(pipeline(**tiny_embeds(), **call, generator=seeded()))
    actual = latents_of(engine(**tiny_embeds(), **call, generator=seeded(), patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


NEGATIVE = {f"negative_{name}": value for name, value in tiny_embeds(2, seed=2).items()}


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize("batched", [True, False])
def test_true_guidance_equals_diffusers(guidance_embeds: bool, batched: bool) -> None:
    """Also beside the distilled guidance, which both passes are given."""
    pipeline = tiny_pipeline(guidance_embeds=guidance_embeds)
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
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
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
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
    engine = ddit_rt.compile(transformer, backend="eager", progress=False)
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
    engine = ddit_rt.compile(transformer, backend="eager", progress=False)
    with pytest.raises(ValueError, match=message):
        engine.denoise(noise(1, 4, 8, 8), **tiny_conditioning(transformer), **arguments)


def test_callback_sees_what_the_pipeline_shows(engine: Engine, pipeline: FluxPipeline) -> None:
    def record(log: list[Any]) -> Any:
        def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
            log.append((step, float(timestep), tensors["latents"].clone(), pipe.num_timesteps))
            tensors["latents"] = tensors["latents"] * 0.5 if step == 1 else tensors["latents"]
            return tensors

        return callback

    ours: list[Any] = []
    theirs: list[Any] = []
    call = {**tiny_embeds(), "num_inference_steps": 4, "height": 64, "width": 64}
    call["output_type"] = "latent"
    final = engine(**call, generator=seeded(), patch_policy=FINE, callback_on_step_end=record(ours))
    expected = pipeline(**call, generator=seeded(), callback_on_step_end=record(theirs))
    assert len(ours) == len(theirs) == 4
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine[0], mine[1], mine[3]) == (yours[0], yours[1], yours[3])
        torch.testing.assert_close(mine[2], yours[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(latents_of(final), latents_of(expected), rtol=0, atol=1e-4)


def test_callback_may_change_the_prompt(engine: Engine, pipeline: FluxPipeline) -> None:
    other = tiny_embeds(seed=5)["prompt_embeds"]

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        if step == 1:
            tensors["prompt_embeds"] = other
        return tensors

    call = {**tiny_embeds(), "num_inference_steps": 4, "height": 64, "width": 64}
    call |= {"output_type": "latent", "callback_on_step_end": callback}
    call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    expected = latents_of(pipeline(**call, generator=seeded()))
    actual = latents_of(engine(**call, generator=seeded(), patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_callback_may_interrupt_as_in_diffusers(engine: Engine) -> None:
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        pipe._interrupt = step == 1
        return tensors

    engine(**tiny_embeds(), num_inference_steps=6, callback_on_step_end=callback)
    assert engine.last_trace is not None
    assert len(engine.last_trace) == 2
    assert engine.last_trace.cancelled


def test_cancel_from_another_thread_ends_the_run(engine: Engine) -> None:
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        if step == 2:
            thread = threading.Thread(target=engine.cancel)
            thread.start()
            thread.join()
        return tensors

    with pytest.raises(RunCancelled, match="after 3 of 8 steps"):
        engine(**tiny_embeds(), num_inference_steps=8, callback_on_step_end=callback)
    engine(**tiny_embeds(), num_inference_steps=2)
    assert engine.last_trace is not None
    assert len(engine.last_trace) == 2


def test_threads_queue_and_get_their_own_results(engine: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 5, "output_type": "latent"}
    alone = [latents_of(engine(**call, generator=seeded(seed))) for seed in range(3)]
    together: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        together[seed] = latents_of(engine(**call, generator=seeded(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in enumerate(alone):
        assert torch.equal(together[seed], expected)


def test_model_that_makes_nan_is_reported(engine: Engine) -> None:
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.warns(UserWarning, match="NaN or infinite during the run") as warned:
        engine(
            **tiny_embeds(),
            num_inference_steps=8,
            callback_on_step_end=callback,
            output_type="latent",
            patch_policy=DDiTPolicy(tau=1e9),
        )
    assert [warning.filename for warning in warned] == [__file__]
