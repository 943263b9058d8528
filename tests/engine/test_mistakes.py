"""Callers' mistakes, one by one: each is an error of one sentence that names the argument.

Values of a wrong kind, for every argument, are in `test_mistakes_drawn.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    WanPipeline,
)
from driving import trace_of
from models import (
    eager,
    noise,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
    tiny_transformer,
)
from wan_models import CALL as WAN_CALL
from wan_models import wan_conditioning, wan_pipeline, wan_transformer

import ddit_rt
from ddit_rt import (
    DDiTPolicy,
    Engine,
    FinePolicy,
    MagCache,
    PatchPolicy,
    StaticPolicy,
    StepCache,
    TeaCache,
    TokenRanges,
)
from ddit_rt.errors import ArtifactError, ArtifactMismatchError, ShapeError, UnsupportedModelError

FLUX_CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
NAN = math.nan


def call(engine: Engine, **arguments: Any) -> Any:
    return engine(**{**tiny_embeds(), **FLUX_CALL, **arguments})


def refused(message: str, kind: type[Exception] | tuple[type[Exception], ...]) -> Any:
    return pytest.raises(kind, match=message)


FLUX_MISTAKES = [
    ({"height": 0}, ShapeError, "got 0 x 64 pixels"),
    ({"height": 4}, ShapeError, "smallest image is 8 x 8"),
    ({"width": -64}, ShapeError, "got 64 x -64 pixels"),
    ({"height": 10**30}, ShapeError, "image tokens are outside the compiled range"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0"),
    ({"num_inference_steps": 4.0}, TypeError, r"num_inference_steps=4\.0; .*pass 4"),
    ({"num_inference_steps": 1001}, ValueError, "num_inference_steps=1001; .*from 1 to 1000"),
    ({"sigmas": [1.0, NAN]}, ValueError, r"got sigmas\[1\]=nan"),
    ({"sigmas": [math.inf, 0.5]}, ValueError, r"got sigmas\[0\]=inf"),
    ({"sigmas": [0.5, -0.1]}, ValueError, "got sigmas=.*1e-06 at least"),
    ({"sigmas": [0.5, 1e-156]}, ValueError, "got sigmas=.*1e-06 at least"),
    ({"sigmas": [0.5, 0.5 - 1e-12]}, ValueError, "got sigmas=.*noise levels that fall"),
    ({"sigmas": [0.5, 0.8]}, ValueError, "got sigmas=.*noise levels that fall"),
    ({"sigmas": [0.5, 0.5]}, ValueError, "got sigmas=.*noise levels that fall"),
    ({"sigmas": [1.5, 0.5]}, ValueError, "got sigmas=.*from 1 at most"),
    ({"sigmas": [1.0, 0.0]}, ValueError, "got sigmas=.*leave the 0 at the end out"),
    ({"sigmas": [1.0, 0.6, 0.3]}, ValueError, "num_inference_steps=2 and 3 sigmas"),
    ({"true_cfg_scale": math.inf}, ValueError, "got true_cfg_scale=inf"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt=0"),
    ({"num_images_per_prompt": 10**9}, ShapeError, "batch size of 1000000000"),
    ({"generator": []}, ValueError, "list of generators of length 0"),
    ({"latents": torch.zeros(1, 64, 16, dtype=torch.int64)}, TypeError, "got latents=.*float"),
    ({"latents": torch.zeros(1, 64, 16, device="meta")}, ValueError, "got latents=.*meta"),
    ({"latents": torch.full((1, 64, 16), NAN)}, ValueError, "NaN or infinity"),
    ({"latents": noise(1, 60, 16)}, ShapeError, r"\[1, 60, 16\]; expected \[1, 64, 16\]"),
    ({"prompt_embeds": torch.zeros(7, 24)}, ShapeError, r"`prompt_embeds` has shape \[7, 24\]"),
    ({"prompt_embeds": torch.zeros(1, 7, 9)}, ShapeError, r"`prompt_embeds`.*text tokens, 24\]"),
    ({"pooled_prompt_embeds": torch.zeros(3, 20)}, ShapeError, "`pooled_prompt_embeds`.*1 or 1"),
    ({"pooled_prompt_embeds": None}, ValueError, "pooled_prompt_embeds"),
    ({"prompt": "a"}, ValueError, "got both prompt and prompt_embeds"),
    ({"prompt_2": "a"}, ValueError, "got both prompt_2 and prompt_embeds"),
    ({"prompt": []}, ValueError, r"got prompt=\[\]"),
    ({"prompt": ["a", 1]}, TypeError, r"got prompt=\['a', 1\]"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt with 2 texts for 1 prompts"),
    ({"output_type": "png"}, ValueError, "got output_type='png'"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, TypeError, "tensor_inputs='latents'"),
    ({"callback_on_step_end_tensor_inputs": ["x"]}, ValueError, "callback_on_step_end_tensor_in"),
    ({"max_sequence_length": 0}, ValueError, "got max_sequence_length=0"),
    ({"max_sequence_length": 1024}, ValueError, "max_sequence_length.*512 but is 1024"),
    ({"num_frames": 9}, ValueError, r"unknown arguments \['num_frames'\]"),
    ({"heigth": 9}, ValueError, r"unknown arguments \['heigth'\]; .*did you mean 'height'"),
    ({"step_caches": 1}, ValueError, "takes .*'step_cache'.*did you mean 'step_cache'"),
    ({"ip_adapter_image": np.zeros((8, 8))}, UnsupportedModelError, "got `ip_adapter_image`"),
]
OWN_MISTAKES = [
    ({"patch_policy": "finne"}, ValueError, r"patch_policy='finne' \(did you mean 'fine'\?\)"),
    ({"patch_policy": 2}, ValueError, "got patch_policy=2.0"),
    ({"patch_policy": "8p:0.5,p"}, ShapeError, r"asks for 8p.*offer only \['p', '2p', '4p'\]"),
    ({"patch_policy": DDiTPolicy({"8p": 1})}, ShapeError, "the policy asks for 8p"),
    ({"patch_policy": DDiTPolicy(warmup="8p")}, ShapeError, "the policy asks for 8p"),
    ({"step_cache": "teacach:0.4"}, ValueError, "step_cache='teacach:0.4'.*did you mean 'tea"),
    ({"guidance_interval": (0, NAN)}, ValueError, r"guidance_interval\[1\]=nan"),
    ({"guidance_interval": (0.0, 0.5, 1.0)}, ValueError, "guidance_interval="),
]


@pytest.mark.parametrize(("arguments", "error", "message"), [*FLUX_MISTAKES, *OWN_MISTAKES])
def test_mistake_in_a_call_is_named(
    flux: Engine, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with refused(message, error) as raised:
        call(flux, **arguments)
    assert "\n" not in str(raised.value)


WAN_MISTAKES = [
    ({"num_frames": 10}, ShapeError, "multiple of 4 plus 1, such as 9 or 13"),
    ({"num_frames": 0}, ShapeError, "such as 1 or 5"),
    ({"num_frames": 40001}, ShapeError, "320032 image tokens are outside the compiled range"),
    ({"height": 70}, ShapeError, "multiples of 16, such as 64 x 128"),
    ({"width": 8}, ShapeError, "multiples of 16, such as 64 x 16"),
    ({"num_videos_per_prompt": 3}, ShapeError, "batch size of 3"),
    ({"negative_prompt": 5}, TypeError, "got negative_prompt=5"),
    ({"prompt": None}, ValueError, "`prompt`"),
    ({"prompt_embeds": torch.zeros(1, 4, 24)}, ValueError, "got both prompt and prompt_embeds"),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 4, 9)},
        ShapeError,
        r"`prompt_embeds` has shape \[1, 4, 9\]",
    ),
    ({"sigmas": [1.0]}, ValueError, r"unknown arguments \['sigmas'\]"),
    ({"attention_kwargs": {"scale": 1.0}}, UnsupportedModelError, "attention_kwargs"),
    ({"guidance_scale_2": 3.0}, ValueError, "boundary_ratio"),
    ({"latents": torch.zeros(1, 4, 2, 8, 16)}, ShapeError, r"expected \[1, 4, 3, 8, 16"),
    ({"prompt": ["a", "b"]}, ShapeError, "batch size of 4; the compiled range is 1 to 2"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WAN_MISTAKES)
def test_mistake_in_a_call_for_a_video_is_named(
    wan: Engine, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with refused(message, error):
        wan(**{**WAN_CALL, **arguments})


DENOISE_MISTAKES = [
    *OWN_MISTAKES,
    ({"latents": np.zeros((1, 4, 8, 8))}, TypeError, "got latents=<ndarray"),
    ({"latents": noise(4, 8, 8)}, ShapeError, r"latents have shape \[4, 8, 8\]"),
    ({"latents": noise(1, 3, 8, 8)}, ShapeError, r"expected \[B, 4, H, W\]"),
    ({"latents": torch.zeros(1, 4, 8, 8).long()}, TypeError, r"got latents=.*\.float\(\)"),
    ({"scheduler": FlowMatchEulerDiscreteScheduler}, TypeError, "got scheduler=.*call the class"),
    ({"num_inference_steps": 2.0}, TypeError, r"num_inference_steps=2\.0; .*pass 2"),
    ({"num_inference_steps": 2, "sigmas": [1.0]}, ValueError, "num_inference_steps=2 and 1 sigma"),
    ({"encoder_hidden_states": None}, ValueError, "`encoder_hidden_states` is missing"),
    ({"pooled_projections": torch.ones(1, 20).bool()}, TypeError, "got pooled_projections="),
    ({"guidance": 3.5}, ValueError, "guidance_embeds=False"),
    ({"prompt": "a"}, ValueError, r"unknown conditioning \['prompt'\]"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), DENOISE_MISTAKES)
def test_mistake_in_a_bare_loop_is_named(
    bare: Engine, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    transformer = bare._compiled.steps.transformer
    rest = {**tiny_conditioning(transformer), "num_inference_steps": 2, "patch_policy": "fine"}
    if "sigmas" in arguments:
        del rest["num_inference_steps"]
    given = {"latents": noise(1, 4, 8, 8), **rest, **arguments}
    with refused(message, error):
        bare.denoise(**given)


@pytest.mark.parametrize("scale", [3.0, "3", [3.0, 4.0]])
def test_guidance_scale_of_a_bare_video_loop_is_a_tensor(scale: Any) -> None:
    engine = eager(wan_transformer())
    conditioning = {**wan_conditioning(guidance_scale=2.0), "guidance_scale": scale}
    with refused("got guidance_scale=.*expected a tensor", (TypeError, ValueError)):
        engine.denoise(noise(1, 4, 3, 8, 8), **conditioning)


COMPILE_MISTAKES = [
    ({"height": 4, "width": 64}, ShapeError, "smallest"),
    ({"height": 4096, "width": 4096}, ShapeError, "outside the compiled range"),
    ({"patch_sizes": ["2p"]}, ValueError, '"p", the model'),
    ({"patch_sizes": ["p", "3p"]}, ValueError, "powers of two"),
    ({"height": 0}, ShapeError, "got 0 x"),
    ({"num_frames": 9}, ShapeError, "got num_frames=9"),
    ({"patch_sizes": [1.0]}, TypeError, "got patch_sizes=1.0"),
    ({"patch_sizes": "p;2p"}, ValueError, "got patch_sizes='p;2p'"),
    ({"adapter": "nowhere"}, ArtifactError, "no such file: nowhere"),
    ({"patch_policy": "finne"}, ValueError, "got patch_policy='finne'"),
    ({"patch_policy": "balanced"}, ValueError, "got patch_policy='balanced'"),
    ({"patch_policy": 0.5}, ValueError, r"got patch_policy=0\.5"),
    ({"patch_policy": "8p:0.5,p"}, ShapeError, "the policy asks for 8p"),
    ({"backend": "inductor"}, ValueError, "got backend='inductor'"),
    ({"executor": "loops"}, ValueError, "got executor='loops'.*did you mean 'loop'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), COMPILE_MISTAKES)
def test_mistake_in_compile_is_named(
    flux: Engine, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with refused(message, error):
        ddit_rt.compile(flux.pipeline, **{"backend": "eager", "progress": False, **arguments})


@pytest.mark.parametrize("name", ["height", "width", "num_frames"])
def test_size_of_a_bare_transformer_would_be_ignored(name: str) -> None:
    with refused(f"got {name}=64 for a bare transformer", ValueError):
        eager(tiny_transformer(), **{name: 64})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": ""}, ValueError, "got path=''"),
        ({"path": "nowhere.ddit"}, ArtifactError, r"no such file: nowhere\.ddit"),
        ({"executor": "fast"}, ValueError, "got executor='fast'"),
        ({"model": "flux"}, UnsupportedModelError, "got a str"),
    ],
)
def test_mistake_in_load_is_named(
    flux: Engine, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"path": "nowhere.ddit", "model": flux.pipeline, **arguments}
    with refused(message, error):
        ddit_rt.load(**given)


def test_file_in_place_of_an_artifact_is_told(flux: Engine, tmp_path: Path) -> None:
    (tmp_path / "a.ddit").write_text("")
    with refused(r"a\.ddit is a file; an artifact is a folder", ArtifactError):
        ddit_rt.load(tmp_path / "a.ddit", flux.pipeline)


def test_artifact_of_another_model_is_refused(flux: Engine, bare: Engine) -> None:
    with refused("of another model or of other packages", ArtifactMismatchError):
        flux.artifact = bare.artifact
    fitting = replace(flux.artifact.manifest, pipeline_defaults={"height": 32})
    flux.artifact = replace(flux.artifact, manifest=fitting)
    flux.artifact = replace(flux.artifact, manifest=replace(fitting, pipeline_defaults={}))


RECORD_MISTAKES = [  # beside what test_mistakes_drawn.py finds
    (lambda: DDiTPolicy({2.5: 1.0}), "got tau's size=2.5"),
    (lambda: DDiTPolicy({"p": 1.0, "2p": 1.0}), "got tau=.*expected each coarse size once"),
    (lambda: DDiTPolicy({"2p": 1.0, 2: 0.5}), "got tau=.*expected each coarse size once"),
    (lambda: DDiTPolicy(order=2.0), "got order=2.0"),
    (lambda: DDiTPolicy(criterion="normalized"), "criterion=.*did you mean 'normalised'"),
    (lambda: DDiTPolicy.paper(tau=None), "got tau=None"),
    (lambda: StaticPolicy(["p", None]), r"got plan\[1\]=None"),
    (lambda: StaticPolicy([True]), r"got plan\[0\]=True"),
    (lambda: StaticPolicy("2p:nan,p"), "plan '2p:nan,p' needs finite shares"),
    (lambda: StaticPolicy("2p:inf,p"), "plan '2p:inf,p' needs finite shares"),
    (lambda: TeaCache(0.4, first=1.0), "got first=1.0"),
    (lambda: TokenRanges(batch=4), "got batch=4"),
    (lambda: TokenRanges(text=(1, 64, 128)), r"got text=\(1, 64, 128\)"),
    (lambda: TokenRanges(text=(2, 1)), "range of text"),
]


@pytest.mark.parametrize(("make", "message"), RECORD_MISTAKES)
def test_mistake_in_a_description_is_named(make: Any, message: str) -> None:
    with refused(message, (TypeError, ValueError)):
        make()


def test_texts_are_the_policies_and_caches_that_they_stand_for() -> None:
    engine = eager(
        tiny_pipeline(),
        patch_sizes="p,2p",
        patch_policy="2p:0.5,p",
        step_cache="magcache:0.1",
    )
    assert engine.default_policy == StaticPolicy("2p:0.5,p")
    assert engine.default_step_cache == MagCache(0.1)
    assert [entry.patch for entry in engine.artifact.manifest.buckets] == ["p", "2p"]
    assert sizes(engine, step_cache="none") == ["2p", "p"]
    assert sizes(engine, step_cache="none", patch_policy="fine") == ["p", "p"]


def sizes(engine: Engine, **arguments: Any) -> list[str]:
    call(engine, **arguments)
    return trace_of(engine).patch_sizes()


@dataclass(frozen=True)
class OwnPolicy(PatchPolicy):
    """A user's own."""

    def resolve(self, schedule: Any) -> Any:
        return FinePolicy().resolve(schedule)


@dataclass(frozen=True)
class OwnCache(StepCache):
    """A user's own."""

    def resolve(self, model: Any) -> Any:
        return None


def test_policy_and_cache_of_a_callers_class_serve_calls_but_no_artifact(flux: Engine) -> None:
    own: Mapping[str, Any] = {"patch_policy": OwnPolicy(), "step_cache": OwnCache()}
    for name, value in own.items():
        with refused(f"got {name}=.*cannot hold one of a class of your own", ValueError):
            eager(flux.pipeline, **{name: value})
    assert sizes(flux, **own) == ["p", "p"]


def test_what_is_missing_from_a_pipeline_is_said_before_any_work(flux: Engine) -> None:
    with refused("got prompt as text .*without tokenizer, text_encoder.*prompt_embeds", ValueError):
        flux("a cat", **FLUX_CALL)
    parts = {**flux.pipeline.components, "vae": None}
    engine = eager(FluxPipeline(**parts))
    with refused("got output_type='pil' for a pipeline without a VAE", ValueError):
        call(engine, output_type="pil")
    video = wan_pipeline()
    bare = {**video.components, "vae": None, "text_encoder": None}
    engine = eager(WanPipeline(**bare, boundary_ratio=None))
    with refused("without text_encoder", ValueError):
        engine(**WAN_CALL)


def test_sigmas_that_the_scheduler_would_ignore_are_refused() -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(**flow)
    engine = eager(pipeline)
    with refused("got sigmas for a DPMSolverMultistep.*use_flow_sigmas=True", ValueError):
        call(engine, sigmas=[1.0, 0.5], patch_policy="fine")


def test_arguments_that_the_pipeline_ignores_are_announced_once_and_traced() -> None:
    engine = eager(tiny_pipeline())
    ignored = [
        ({"guidance_scale": 3.5}, "guidance_scale=3.5 is ignored: .*guidance_embeds=False"),
        ({"negative_prompt": "blurry"}, "negative_prompt is ignored without a true_cfg_scale"),
    ]
    for arguments, message in ignored:
        with pytest.warns(UserWarning, match=message) as warned:
            call(engine, **arguments, patch_policy="fine")
        assert [warning.filename for warning in warned] == [__file__]
        call(engine, **arguments, patch_policy="fine")
        assert any("is ignored" in note for note in trace_of(engine).notes)
    call(engine, negative_prompt="blurry", true_cfg_scale=1.0, guidance_scale=0.0)
    experts = eager(wan_pipeline(boundary_ratio=0.5), patch_policy="fine")
    with pytest.warns(UserWarning, match="guidance_scale_2=4 is ignored at guidance_scale=1"):
        experts(**WAN_CALL, guidance_scale=1.0, guidance_scale_2=4.0)


def test_none_is_the_size_that_was_compiled_for() -> None:
    engine = eager(tiny_pipeline(), height=32, width=64)
    rest = {**tiny_embeds(), "num_inference_steps": 1, "patch_policy": "fine"}
    picture = engine(**rest, height=None, width=np.int64(48)).images[0]
    assert picture.size == (48, 32)


def test_mistake_leaves_the_engine_as_it_was(flux: Engine) -> None:
    before = call(flux, generator=seeded()).images
    trace = flux.last_trace
    for arguments, error, _ in (*FLUX_MISTAKES, *OWN_MISTAKES):
        with pytest.raises(error):
            call(flux, **arguments)
    assert flux.last_trace is trace
    assert torch.equal(call(flux, generator=seeded()).images, before)
