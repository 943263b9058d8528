"""FLUX driven by its pipeline's own loop, beside diffusers' own transformer in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import (
    CALLBACKS,
    FINE,
    assert_equal,
    keep,
    latents_of,
    relative_error,
    runs,
    trace_of,
)
from models import eager, noise, seeded, tiny_conditioning, tiny_embeds, tiny_pipeline
from torch import Tensor

from ddit_rt import DDiTPolicy, Engine, PatchPolicy, StaticPolicy, TeaCache
from ddit_rt.errors import RunCancelled, ShapeError, UnsupportedModelError
from ddit_rt.models.flux import FluxFamily

CALL = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}
NEGATIVE = {f"negative_{name}": tensor for name, tensor in tiny_embeds(seed=9).items()}
GUIDED = {"true_cfg_scale": 3.0, **NEGATIVE}


def own_attributes(pipeline: Any) -> list[set[str]]:
    return [set(vars(one)) for one in (pipeline, pipeline.transformer, pipeline.scheduler)]


@pytest.mark.parametrize("place", range(len(CALLBACKS)), ids=CALLBACKS)
def test_every_callback_does_what_it_does_in_diffusers(flux: Engine, place: int) -> None:
    """With guidance and without by turns; Wan's are guided."""
    callback, guided = list(CALLBACKS.values())[place], place % 2 == 1
    call = {**CALL, **tiny_embeds(), **(GUIDED if guided else {})}
    # Diffusers' FLUX pipeline does not ask a callback object what it needs.
    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert_equal(*runs(flux.pipeline, flux, call, **{**names, **callback}))
    trace = trace_of(flux)
    assert trace.executor == "pipeline-cpu"
    assert "driven by the pipeline's own loop: callback_on_step_end" in trace.notes[-1]
    interrupted = callback is CALLBACKS["interrupt"]
    assert (len(trace), trace.cancelled) == ((3, True) if interrupted else (6, False))


def test_batches_and_one_prompt_for_all_equal_diffusers(flux: Engine) -> None:
    call = {**CALL, **tiny_embeds(), "num_images_per_prompt": 2}
    assert_equal(*runs(flux.pipeline, flux, call, **CALLBACKS["in-place latents"]))


def test_tensors_that_no_callback_is_given_are_seen_too(flux: Engine) -> None:
    """The caller's own, which a callback reaches by its name."""
    results = []
    for run in (flux, flux.pipeline):
        embeds = tiny_embeds()

        def change(_: Any, step: int, t: Any, tensors: Any, embeds: Any = embeds) -> Any:
            if step == 2:
                embeds["pooled_prompt_embeds"].mul_(-2)
            return tensors

        policy = {"patch_policy": FINE} if run is flux else {}
        call = {**CALL, **embeds, "callback_on_step_end": change, **policy}
        results.append(latents_of(run(**call, generator=seeded())))
    assert_equal(*results)
    plain = latents_of(flux.pipeline(**CALL, **tiny_embeds(), generator=seeded()))
    assert relative_error(plain, results[1]) > 1e-3


def test_a_preview_decodes_what_it_is_given_in_half_precision() -> None:
    pipeline = tiny_pipeline().to(torch.bfloat16)
    engine = eager(pipeline)
    seen: list[Any] = []

    def preview(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        latents = tensors["latents"]
        picture = pipe.vae.decode(pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor))
        seen.append((step, timestep, latents.dtype, latents.shape, picture.sample.dtype))
        return tensors

    embeds = {name: value.bfloat16() for name, value in tiny_embeds().items()}
    # The blocks are the same, so that even their rounding is.
    assert_equal(*runs(pipeline, engine, CALL | embeds, callback_on_step_end=preview), tolerance=0)
    assert seen[:6] == seen[6:]
    assert seen[0][2] == torch.bfloat16


def test_the_callback_sees_the_users_own_pipeline(flux: Engine) -> None:
    states: list[list[Any]] = []

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        assert pipe is flux.pipeline
        assert pipe.transformer is flux.pipeline.transformer
        scheduler = pipe.scheduler
        states.append(
            [
                *(step, timestep, pipe.num_timesteps, pipe.current_timestep, pipe.guidance_scale),
                *(scheduler.step_index, scheduler.sigmas.tolist(), scheduler.timesteps.tolist()),
                *(pipe.transformer.dtype, sorted(tensors)),
            ]
        )
        return tensors

    runs(flux.pipeline, flux, CALL | tiny_embeds(), callback_on_step_end=look, guidance_scale=2.0)
    assert len(states) == 12
    assert states[:6] == states[6:]


def test_a_callbacks_own_call_of_the_transformer_runs_the_model() -> None:
    pipeline = tiny_pipeline()
    outputs: list[Tensor] = []

    def call_it(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
        output = pipe.transformer(
            hidden_states=tensors["latents"],
            timestep=timestep[None] / 1000,
            encoder_hidden_states=tensors["prompt_embeds"],
            pooled_projections=tiny_embeds()["pooled_prompt_embeds"],
            txt_ids=torch.zeros(7, 3),
            img_ids=ids,
        ).sample
        outputs.append(output)
        return {"latents": tensors["latents"] + 0.1 * output} if step == 1 else tensors

    callback = {
        "callback_on_step_end": call_it,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    assert_equal(*runs(pipeline, eager(pipeline), CALL | tiny_embeds(), **callback))
    for ours, theirs in zip(outputs[:6], outputs[6:], strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("policy", "guided"),
    [
        (FINE, False),
        (StaticPolicy(["p", "2p", "4p", "p", "2p", "2p"]), True),
        (DDiTPolicy(tau=1.0, fine_tail=1), True),
    ],
)
def test_a_callback_that_changes_nothing_changes_nothing(
    flux: Engine, policy: PatchPolicy, guided: bool
) -> None:
    """Halves of guidance apart, and joined by the pipeline, are the halves that a bucket joins."""
    call = {**CALL, **tiny_embeds(), **(GUIDED if guided else {}), "patch_policy": policy}
    table = latents_of(flux(**call, generator=seeded()))
    expected = trace_of(flux)
    driven = latents_of(flux(**call, generator=seeded(), callback_on_step_end=keep))
    trace = trace_of(flux)
    assert (expected.executor, trace.executor) == ("cpu", "pipeline-cpu")
    assert trace.patch_sizes() == expected.patch_sizes()
    assert [(r.tokens, r.sigma, r.reason) for r in trace] == [
        (r.tokens, r.sigma, r.reason) for r in expected
    ]
    for ours, theirs in zip(trace, expected, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-3)
    assert_equal(driven, table)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.34, 0.67)])
def test_a_guidance_interval_holds(
    flux: Engine, interval: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**CALL, **tiny_embeds(), **GUIDED, "guidance_interval": interval, "patch_policy": FINE}
    table = latents_of(flux(**call, generator=seeded()))
    calls: list[int] = []
    run_blocks = FluxFamily.run_blocks

    def counted(self: FluxFamily, *args: Any) -> Tensor:
        calls.append(1)
        return run_blocks(self, *args)

    monkeypatch.setattr(FluxFamily, "run_blocks", counted)
    driven = latents_of(flux(**call, generator=seeded(), callback_on_step_end=keep))
    assert_equal(driven, table)
    assert len(calls) == (12 if interval == (0.0, 1.0) else 8)  # the other half is not run


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_a_step_cache_reuses_the_same_steps(flux: Engine, interval: tuple[float, float]) -> None:
    """Each half of guidance has a sum of its own and a say, also before its call of the step."""
    call = {**CALL, **tiny_embeds(), **GUIDED, "num_inference_steps": 12, "patch_policy": FINE}
    call |= {"step_cache": TeaCache(0.3, coefficients=(1.0, 0.0)), "guidance_interval": interval}
    table = latents_of(flux(**call, generator=seeded()))
    expected = trace_of(flux)
    driven = latents_of(flux(**call, generator=seeded(), callback_on_step_end=keep))
    assert [r.cache_reason for r in trace_of(flux)] == [r.cache_reason for r in expected]
    assert 0 < expected.reused < 12
    sums = [[r.accumulated or 0 for r in trace] for trace in (trace_of(flux), expected)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    assert_equal(driven, table)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ("cancelled", RunCancelled, "after 3 of 6 steps"),
        (KeyError("mine"), KeyError, "mine"),
        ([], TypeError, "returned list; expected the dictionary"),
        ({"latents": 3}, TypeError, "returned int as latents"),
    ],
)
def test_a_run_that_a_callback_ends_leaves_the_pipeline_as_it_was(
    result: Any, error: type[Exception], message: str
) -> None:
    pipeline = tiny_pipeline()
    engine = eager(pipeline)
    pipeline(**CALL, **tiny_embeds())  # sets what a call of diffusers sets
    before = own_attributes(pipeline)

    def end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if isinstance(result, Exception):
            raise result
        if result != "cancelled":
            return result
        if step == 2:
            engine.cancel()
        return tensors

    with pytest.raises(error, match=message):
        engine(**CALL, **tiny_embeds(), patch_policy=FINE, callback_on_step_end=end)
    if error is RunCancelled:
        assert len(trace_of(engine)) == 3
        assert trace_of(engine).cancelled
    assert own_attributes(pipeline) == before
    assert_equal(*runs(pipeline, engine, CALL | tiny_embeds(), callback_on_step_end=keep))


def test_a_callback_may_return_nothing(flux: Engine) -> None:
    call = {**CALL, **tiny_embeds(), "patch_policy": FINE}
    expected = latents_of(flux(**call, generator=seeded()))
    actual = flux(**call, generator=seeded(), callback_on_step_end=lambda *_: None)
    assert_equal(latents_of(actual), expected)


def test_what_the_model_would_ignore_is_refused_where_it_comes_from_a_callback(
    flux: Engine,
) -> None:

    def scale_lora(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        pipe._joint_attention_kwargs = {"scale": 0.5}
        return tensors

    with pytest.raises(UnsupportedModelError, match="`joint_attention_kwargs`.*leave out"):
        flux(**CALL, **tiny_embeds(), callback_on_step_end=scale_lora)


def test_a_prompt_of_another_length_is_refused_in_the_middle(flux: Engine) -> None:

    def longer(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        return {"prompt_embeds": torch.zeros(1, 9, 24)} if step == 1 else {}

    with pytest.raises(
        ShapeError,
        match=r"step 2 has \[1, 9, 24\] as `encoder_hidden_states` in a pass of \[1, 7, 24\]",
    ):
        flux(**CALL, **tiny_embeds(), callback_on_step_end=longer)


def test_a_callback_cannot_start_another_run_of_its_engine(flux: Engine) -> None:
    conditioning = tiny_conditioning(flux.pipeline.transformer)
    for again in (
        lambda *_: flux(**CALL, **tiny_embeds()),
        lambda *_: flux.denoise(noise(1, 4, 16, 16), **conditioning),
    ):
        with pytest.raises(ValueError, match="let the run end first"):
            flux(**CALL, **tiny_embeds(), callback_on_step_end=again)
    flux(**CALL, **tiny_embeds())


def test_initial_latents_that_are_not_finite_are_refused(flux: Engine) -> None:
    latents = torch.full((1, 64, 16), float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        flux(**CALL, **tiny_embeds(), latents=latents, callback_on_step_end=keep)


def test_a_scheduler_that_draws_noise_runs_in_the_pipelines_loop() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    engine = eager(pipeline)
    call = {**CALL, **tiny_embeds(), **CALLBACKS["in-place latents"]}
    torch.manual_seed(0)
    expected = latents_of(pipeline(**call, generator=seeded()))
    with pytest.warns(
        UserWarning, match="own loop: the scheduler FlowMatch.*draws noise"
    ) as warned:
        engine(**CALL, **tiny_embeds(), patch_policy=FINE)
    assert [warning.filename for warning in warned] == [__file__]
    torch.manual_seed(0)  # and no warning again
    assert_equal(latents_of(engine(**call, generator=seeded(), patch_policy=FINE)), expected)
    assert "draws noise" in trace_of(engine).notes[-1]


def test_a_callback_object_is_asked_what_it_needs(flux: Engine) -> None:
    """Which diffusers' FLUX pipeline does not do, so that such objects fail there by default."""
    call = {**CALL, **tiny_embeds(), "patch_policy": FINE}
    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    runs_of = [
        latents_of(flux(**call, **CALLBACKS["object"], **more, generator=seeded()))
        for more in ({}, names)
    ]
    assert torch.equal(*runs_of)


def test_what_compile_left_on_the_transformer_is_not_called() -> None:
    """`transformer.compile()` puts a function before `forward`; the engine's own blocks run."""
    pipeline = tiny_pipeline()
    expected = latents_of(pipeline(**CALL, **tiny_embeds(), generator=seeded()))
    engine = eager(pipeline)
    pipeline.transformer.compile(backend="eager")
    compiled = vars(pipeline.transformer)["_compiled_call_impl"]
    call = {**CALL, **tiny_embeds(), "patch_policy": FINE, "callback_on_step_end": keep}
    assert_equal(latents_of(engine(**call, generator=seeded())), expected)
    assert len(trace_of(engine)) == 6
    assert vars(pipeline.transformer)["_compiled_call_impl"] is compiled
