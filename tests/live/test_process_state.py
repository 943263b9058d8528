"""An engine means the same whatever state of torch its caller is in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import wan_models
from diffusers import FluxPipeline, UniPCMultistepScheduler
from lora_files import style
from models import (
    eager,
    latents_of,
    noise,
    random_adapters,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
)
from torch import Tensor

import ddit_rt
from ddit_rt.adapters import AdapterSet

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 8,
    "output_type": "latent",
    **tiny_embeds(),
}
MIXED = ddit_rt.StaticPolicy("p:0.25,2p:0.25,4p:0.25,p")


@contextlib.contextmanager
def holding(change: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return holding(torch.set_default_dtype, dtype, torch.float32)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": lambda: holding(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: holding(torch.set_num_threads, 3, torch.get_num_threads()),
}


def adapted(pipeline: FluxPipeline, adapters: AdapterSet | None = None) -> ddit_rt.Engine:
    return ddit_rt.compile(
        pipeline,
        backend="eager",
        adapter=adapters or random_adapters(pipeline),
        progress=False,
    )


def multistep() -> FluxPipeline:
    """With a solver that computes on tensors of its own making."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return pipeline


RUNS: dict[str, tuple[Callable[[], FluxPipeline], dict[str, Any]]] = {
    "adapters": (tiny_pipeline, {"patch_policy": MIXED}),
    "dynamic": (tiny_pipeline, {"patch_policy": ddit_rt.DDiTPolicy()}),
    "the pipeline's own loop": (
        tiny_pipeline,
        {"patch_policy": ddit_rt.DDiTPolicy(), "callback_on_step_end": lambda *_: {}},
    ),
    "multistep": (multistep, {"patch_policy": ddit_rt.FinePolicy()}),
    "step cache": (
        tiny_pipeline,
        {
            "patch_policy": ddit_rt.FinePolicy(),
            "step_cache": ddit_rt.TeaCache(0.4, coefficients=(1.0, 0.0)),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "run"),
    [  # every state with two runs, every run with a state of every kind
        (name, run)
        for row, name in enumerate(STATES)
        for column, run in enumerate(RUNS)
        if (row - column) % 5 in (0, 2)
    ],
)
def test_run_and_compile_have_the_same_bits_in_any_state(name: str, run: str) -> None:
    make, arguments = RUNS[run]
    pipeline = make()
    adapters = random_adapters(pipeline)
    engine = adapted(pipeline, adapters)
    expected = latents_of(engine(**CALL, **arguments, generator=seeded()))
    with STATES[name]():
        inside = latents_of(engine(**CALL, **arguments, generator=seeded()))
        made_inside = adapted(pipeline, adapters)
    assert torch.equal(inside, expected)
    # And back: nothing that was made in another state may be of no use outside of it.
    assert torch.equal(latents_of(engine(**CALL, **arguments, generator=seeded())), expected)
    assert torch.equal(latents_of(made_inside(**CALL, **arguments, generator=seeded())), expected)


def test_compiled_engine_has_the_same_bits_in_any_state(engine: ddit_rt.Engine) -> None:
    expected = latents_of(engine(**CALL, patch_policy=MIXED, generator=seeded()))
    for name, state in STATES.items():
        with state():
            inside = latents_of(engine(**CALL, patch_policy=MIXED, generator=seeded()))
        assert torch.equal(inside, expected), name


@pytest.mark.parametrize("callback", [None, lambda *_: None])
def test_denoise_computes_on_the_models_device_whatever_the_default_is(callback: Any) -> None:
    """Not through the pipeline, whose own call fails with a default device that it is not on."""
    pipeline = tiny_pipeline()
    adapters, latents = random_adapters(pipeline), noise(1, 4, 16, 16)
    engine = adapted(pipeline, adapters)
    conditioning = tiny_conditioning(pipeline.transformer)
    arguments: dict[str, Any] = {
        "num_inference_steps": 8,
        "patch_policy": MIXED,
        "callback": callback,
        **conditioning,
    }
    expected = engine.denoise(latents, **arguments)
    with holding(torch.set_default_device, "meta", None):
        inside = engine.denoise(latents, **arguments)
        made_inside = adapted(pipeline, adapters)
    assert torch.equal(inside, expected)
    assert torch.equal(made_inside.denoise(latents, **arguments), expected)


@pytest.mark.parametrize("scheduler", [wan_models.unipc, wan_models.euler, wan_models.heun])
def test_wan_has_the_same_bits_with_another_default_dtype(scheduler: Callable[[], Any]) -> None:
    engine = eager(wan_models.wan_pipeline(scheduler()))
    arguments = {**wan_models.CALL, "patch_policy": ddit_rt.FinePolicy()}
    expected = engine(**arguments, generator=seeded()).frames
    with default_dtype(torch.bfloat16):
        assert torch.equal(engine(**arguments, generator=seeded()).frames, expected)


def test_model_that_was_made_in_inference_mode_runs_outside() -> None:
    expected = latents_of(adapted(tiny_pipeline())(**CALL, patch_policy=MIXED, generator=seeded()))
    with torch.inference_mode():
        pipeline = tiny_pipeline()
    assert next(pipeline.transformer.parameters()).is_inference()
    engine = adapted(pipeline)
    actual = latents_of(engine(**CALL, patch_policy=MIXED, generator=seeded()))
    assert torch.equal(actual, expected)


def test_fused_weights_have_the_same_bits_in_any_state() -> None:
    pipeline = tiny_pipeline()
    engine, lora = adapted(pipeline), style(pipeline)

    def weights() -> dict[str, Tensor]:
        return {key: one.clone() for key, one in pipeline.transformer.state_dict().items()}

    before, expected = weights(), None
    for state in (contextlib.nullcontext, *STATES.values()):
        with state():
            engine.load_lora(lora)
        fused = weights()
        with state():
            engine.unload_loras()
        assert_same(weights(), before)
        expected = expected or fused
        assert_same(fused, expected)
    assert any(not torch.equal(fused[key], one) for key, one in before.items())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_the_pipelines_own_parts_run_in_the_callers_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders, VAE and callbacks see what they would in the pipeline's own call."""
    seen: dict[str, list[bool]] = {"ours": [], "diffusers": []}
    modes: list[bool] = []
    pipeline = tiny_pipeline()
    calls: dict[str, Callable[..., Any]] = {"ours": adapted(pipeline), "diffusers": pipeline}

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            note()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def note(*_: Any) -> dict[str, Any]:
        modes.append(torch.is_autocast_enabled("cpu"))
        modes.append(torch.is_inference_mode_enabled())
        modes.append(torch.is_grad_enabled())
        return {}

    watch(pipeline, "encode_prompt")
    watch(pipeline.vae, "decode")
    for names in ([], ["latents"]):
        arguments = {
            **CALL,
            "output_type": "pt",
            "callback_on_step_end": note,
            "callback_on_step_end_tensor_inputs": names,
        }
        for who, call in calls.items():
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
                call(**arguments, generator=seeded())
            seen[who] += modes
            modes.clear()
    assert seen["ours"] == seen["diffusers"]
    assert set(seen["ours"][::3]) == {True}
