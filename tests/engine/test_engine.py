"""The engine against diffusers' own pipeline, and what it does with everything else."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, UniPCMultistepScheduler
from driving import FINE, trace_of
from models import eager, latents_of, noise, seeded, tiny_conditioning, tiny_embeds, tiny_pipeline
from PIL import Image
from torch import Tensor

from ddit_rt import DDiTPolicy, Engine, StaticPolicy
from ddit_rt.engine.intercepted import InterceptedRun
from ddit_rt.errors import RunCancelled, ShapeError, UnsupportedModelError

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module")
def uncompiled() -> Engine:
    return eager(tiny_pipeline(), height=64, width=64)


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


@pytest.mark.parametrize(
    ("config", "scheduler", "arguments"),
    [
        ({"guidance_embeds": True}, None, {"guidance_scale": 1.0}),
        ({"guidance_embeds": True}, None, {"guidance_scale": 3.5}),
        ({"dynamic_shifting": False}, None, {"sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3}),
        ({}, UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True), {}),
        ({}, None, {"latents": noise(2, 64, 16, seed=5)}),
    ],
    ids=["no guidance", "guidance", "sigmas", "unipc", "latents"],
)
def test_what_a_call_or_its_scheduler_asks_for_equals_diffusers(
    config: dict[str, Any], scheduler: Any, arguments: dict[str, Any]
) -> None:
    pipeline = tiny_pipeline(**config)
    pipeline.scheduler = scheduler or pipeline.scheduler
    call = {**tiny_embeds(2), "height": 64, "width": 64, "num_inference_steps": 8, **arguments}
    call["output_type"] = "latent"
    expected = latents_of(pipeline(**call, generator=seeded()))
    actual = latents_of(eager(pipeline)(**call, generator=seeded(), patch_policy=FINE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plan", ["p", "4p:0.4,2p:0.4,p"])
def test_half_precision_follows_full_precision(plan: str) -> None:
    call = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = tiny_pipeline().to(dtype)
        engine = eager(pipeline)
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


def test_output_types_and_return_dict(uncompiled: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 2}
    assert isinstance(uncompiled(**call, output_type="pt").images, Tensor)
    assert uncompiled(**call, output_type="np").images.shape == (1, 64, 64, 3)
    result = uncompiled(**call, output_type="latent", return_dict=False)
    assert isinstance(result, tuple)


def test_what_the_pipeline_does_in_a_way_of_its_own_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noise, schedule, decoding and checks are those of the pipeline's call, whatever they are."""
    pipeline = tiny_pipeline()
    engine = eager(pipeline)
    call = {**tiny_embeds(), "height": 64, "width": 64, "num_inference_steps": 3}
    call["output_type"] = "pt"
    plain = pipeline(**call, generator=seeded()).images
    prepare, unpack = pipeline.prepare_latents, pipeline._unpack_latents

    def louder(*args: Any) -> tuple[Tensor, Tensor]:
        latents, ids = prepare(*args)
        return 1.5 * latents, ids

    monkeypatch.setattr(pipeline, "prepare_latents", louder)
    monkeypatch.setattr(pipeline, "_unpack_latents", lambda *args: unpack(*args).flip(-1))
    expected = pipeline(**call, generator=seeded()).images
    actual = engine(**call, generator=seeded(), patch_policy=FINE).images
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=0.01)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not on Sundays")

    monkeypatch.setattr(pipeline, "check_inputs", refuse)
    with pytest.raises(ValueError, match="not on Sundays"):
        engine(**call, patch_policy=FINE)


def test_the_pipelines_own_loop_runs_the_first_step_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it were interrupted, where it knows that; else its steps pass, and change nothing."""
    calls: list[Any] = []
    own = InterceptedRun._forward

    def counted(run: InterceptedRun, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return own(run, *args, **kwargs)

    monkeypatch.setattr(InterceptedRun, "_forward", counted)
    call = {**tiny_embeds(), "num_inference_steps": 5, "output_type": "latent"}
    skipped = latents_of(engine(**call, height=64, width=64, generator=seeded()))
    assert len(calls) == 1
    assert engine.pipeline.interrupt is False
    monkeypatch.setattr(FluxPipeline, "interrupt", False)
    passed = latents_of(engine(**call, height=64, width=64, generator=seeded()))
    assert len(calls) == 1 + 5
    assert torch.equal(passed, skipped)


def test_denoise_equals_the_pipeline_call(uncompiled: Engine) -> None:
    start = noise(2, 4, 16, 16)
    conditioning = tiny_conditioning(uncompiled.pipeline.transformer, 2)
    loop = uncompiled.denoise(start, num_inference_steps=5, **conditioning)
    packed = FluxPipeline._pack_latents(start, 2, 4, 16, 16)
    whole = latents_of(
        uncompiled(**tiny_embeds(2), num_inference_steps=5, latents=packed, output_type="latent")
    )
    torch.testing.assert_close(FluxPipeline._pack_latents(loop, 2, 4, 16, 16), whole)


def test_bare_transformer_runs_its_loop_and_says_so() -> None:
    pipeline = tiny_pipeline()
    engine = eager(pipeline.transformer)
    conditioning = tiny_conditioning(pipeline.transformer)
    latents = engine.denoise(noise(1, 4, 16, 16), num_inference_steps=3, **conditioning)
    assert latents.shape == (1, 4, 16, 16)
    with pytest.raises(UnsupportedModelError, match=r"engine\.denoise"):
        engine("a cat")


def test_adapters_and_policy_come_from_the_artifact(engine: Engine) -> None:
    engine(**tiny_embeds(), num_inference_steps=4)
    assert engine.default_policy == StaticPolicy("2p:0.5,p")
    assert trace_of(engine).patch_sizes() == ["2p", "2p", "p", "p"]
    methods = {entry.patch: entry.method for entry in engine.artifact.manifest.buckets}
    assert methods == {"p": "base", "2p": "adapter", "4p": "adapter"}


def test_height_and_width_default_to_those_compiled_for(uncompiled: Engine) -> None:
    assert uncompiled(**tiny_embeds(), num_inference_steps=1).images[0].size == (64, 64)
    assert uncompiled(**tiny_embeds(), num_inference_steps=1, width=96).images[0].size == (96, 64)


def test_size_of_too_few_tokens_is_not_offered(uncompiled: Engine) -> None:
    call = {**tiny_embeds(), "num_inference_steps": 8, "height": 24, "width": 24}
    reason = "4p is not offered.* 1 image tokens are outside the compiled range 4 to"
    with pytest.warns(UserWarning, match=reason) as warned:
        uncompiled(**call, patch_policy=DDiTPolicy(tau=1e9))
    assert [warning.filename for warning in warned] == [__file__]
    assert set(trace_of(uncompiled).patch_sizes()) == {"2p", "p"}
    assert "4p is not offered" in trace_of(uncompiled).notes[0]
    with pytest.raises(ShapeError, match=r"asks for 4p.*\['p', '2p'\]"):
        uncompiled(**call, patch_policy=StaticPolicy("4p:0.5,p"))


def test_cancel_from_another_thread_ends_the_run(uncompiled: Engine) -> None:
    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        if step == 2:
            thread = threading.Thread(target=uncompiled.cancel)
            thread.start()
            thread.join()
        return tensors

    with pytest.raises(RunCancelled, match="after 3 of 8 steps"):
        uncompiled(**tiny_embeds(), num_inference_steps=8, callback_on_step_end=callback)
    uncompiled(**tiny_embeds(), num_inference_steps=2)
    assert len(trace_of(uncompiled)) == 2


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
