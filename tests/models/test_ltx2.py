"""LTX-2 against diffusers' own pipeline: video and its soundtrack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import FINE, assert_equal
from family_suite import (
    CACHE,
    MIXED,
    OTHER,
    TOLERANCE,
    FamilyCase,
    LoopSuite,
    captured_by,
    eager,
    generated,
    lora_of,
    trace_of,
)
from ltx2_models import CHANNELS, tiny_embeds, tiny_pipeline, tiny_transformer
from models import noise, seeded
from torch import Tensor

import ddit_rt
from ddit_rt import DDiTPolicy, Engine
from ddit_rt.cli import main
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.lab.calibrate.cache_fit import measuring_plan
from ddit_rt.models import family_of

pytestmark = pytest.mark.filterwarnings("ignore:.*a soundtrack advances with the video")

NO_STG = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
APART = {"modality_scale": 3.0, "audio_modality_scale": 2.0}
EVERY = {**APART, "stg_scale": 1.0, "audio_stg_scale": 0.5, "spatio_temporal_guidance_blocks": [1]}
"""Guidance of every kind, as a call that says nothing of it has."""


def both_of(engine: Any, call: Mapping[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """Latents of video and audio."""
    output = engine(**call, **more, generator=seeded())
    return output.frames, output.audio


def assert_both_equal(engine: Engine, pipeline: Any, call: Mapping[str, Any], **more: Any) -> None:
    ours = both_of(engine, call, patch_policy=FINE, **more)
    for one, other in zip(ours, both_of(pipeline, call, **more), strict=True):
        assert_equal(one, other, tolerance=TOLERANCE)


class TestLTX2(LoopSuite):
    """16 x 16 pixels are a latent one, and 4 frames, but for the first."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided={"guidance_scale": 3.0, "audio_guidance_scale": 7.0},
        sizes=((64, 96), (96, 64)),
        executor="pipeline-cpu",
        schedulers={"constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)},
        more={
            "num_frames": 9,
            "guidance_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "modality_scale": 1.0,
            "audio_modality_scale": 1.0,
            **NO_STG,
        },
    )

    @pytest.mark.slow
    def test_captured_runs_equal_the_cpus_to_the_bit(self, engine: Engine, graphs: Any) -> None:
        device = captured_by(graphs, self.case.pipeline())
        calls = zip(self.case.kinds(), self.case.kinds(seed=8), strict=True)
        for call, other in calls:
            runs = ((call, MIXED), (other, OTHER), (call, MIXED))
            for arguments, policy in runs:
                ours = both_of(device, arguments, patch_policy=policy)
                expected = both_of(engine, arguments, patch_policy=policy)
                assert all(map(torch.equal, ours, expected))
        assert trace_of(device).executor == "pipeline-cuda"
        names = {f"{size}{one}" for size in ("p", "2p") for one in ("", " negative prompt")}
        assert set(graphs.captured) == names

    test_a_first_block_may_run_ahead_of_the_others = None

    def test_a_step_cache_reuses_what_the_blocks_added(self, engine: Engine) -> None:
        """It would not know what they added to the sound."""
        with pytest.raises(UnsupportedModelError, match=r"MagCache.*soundtrack.*Leave step_cache"):
            generated(engine, self.case.call(), step_cache=CACHE)

    def test_what_magcache_has_to_know_is_measured(self, engine: Engine) -> None:
        with pytest.raises(UnsupportedModelError, match="no plan can be made of this run"):
            measuring_plan(engine, "magcache", **self.case.call(), generator=seeded())

    def test_denoise_takes_the_arguments_of_the_models_own_forward(self, engine: Engine) -> None:
        with pytest.raises(UnsupportedModelError, match="without its pipeline.*its two latents"):
            eager(tiny_transformer())
        with pytest.raises(UnsupportedModelError, match="steps one latent, and LTX-2 has two"):
            engine.denoise(noise(1, CHANNELS, 2, 4, 6))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """At every patch size, for tests that change nothing of it."""
    return ddit_rt.compile(tiny_pipeline(), backend="eager", progress=False)


GUIDANCE = {
    "two guided, rescaled": ((4, 7), (3, 5), {"guidance_rescale": 0.5}),
    "apart": ((7,), (), APART),
    "in every way": ((7,), (5,), EVERY),
    "sound alone guided": ((7,), (5,), {"guidance_scale": 1.0}),
    "own time for each": ((7,), (), {"use_cross_timestep": False}),
}
QUICK = ("two guided, rescaled", "in every way")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name, way in GUIDANCE.items()
    ],
)
def test_video_and_sound_equal_diffusers_in_every_way_to_guide(engine: Engine, way: Any) -> None:
    lengths, negative, more = way
    call = TestLTX2.case.call(lengths, negative, **more)
    assert_both_equal(engine, engine.pipeline, call)
    mixed = both_of(engine, call, patch_policy=MIXED)
    for coarse, fine in zip(mixed, both_of(engine, call, patch_policy=FINE), strict=True):
        assert coarse.shape == fine.shape
        assert torch.isfinite(coarse).all()
        assert float((coarse - fine).abs().max()) > 1e-6
    assert trace_of(engine).executor == "pipeline-cpu"
    assert any("a soundtrack advances" in note for note in trace_of(engine).notes)


VERSIONS = {
    "2.3": {
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
        "gated_attn": True,
        "audio_gated_attn": True,
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "rope_type": "split",
    },
    "2.5": {
        "use_prompt_embeddings": False,
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "use_prompt_adaln_single": False,
        "use_keyframes_abs_pos_embedding": True,
        "ff_bias": False,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("config", VERSIONS.values(), ids=VERSIONS)
def test_later_versions_of_the_class_equal_diffusers(config: dict[str, Any]) -> None:
    pipeline = tiny_pipeline(**config)
    engine, call = eager(pipeline), TestLTX2.case.call((7, 4), (5, 6), **EVERY)
    assert_both_equal(engine, pipeline, call)
    both = both_of(engine, call, patch_policy=FINE)
    less = both_of(engine, {**call, **NO_STG}, patch_policy=FINE)
    changed = [float((one - other).abs().max()) for one, other in zip(both, less, strict=True)]
    assert (min(changed) > 1e-3) is config.get("perturbed_attn", False)


@pytest.mark.parametrize("seconds", [{"num_frames": 17}, {"frame_rate": 8.0}])
def test_other_lengths_of_sound_run_on_the_same_blocks(
    engine: Engine, seconds: dict[str, Any]
) -> None:
    assert_both_equal(engine, engine.pipeline, TestLTX2.case.call((7,), (5,), **seconds))


@pytest.mark.slow
def test_a_size_that_no_patch_divides_runs_at_every_patch(engine: Engine) -> None:
    """Latents of 6 x 10 are 3 x 5 at 2p and 2 x 3 at 4p."""
    call = TestLTX2.case.call((7, 4), (5, 6), height=96, width=160, num_inference_steps=6)
    assert_both_equal(engine, engine.pipeline, call)
    mixed = both_of(engine, call, patch_policy="4p:0.34,2p:0.34,p")
    assert [record.tokens for record in trace_of(engine)] == [18, 18, 45, 45, 180, 180]
    assert all(torch.isfinite(one).all() for one in mixed)
    both_of(engine, call, patch_policy=DDiTPolicy(tau=9.0, fine_tail=1))
    assert "4p" in trace_of(engine).patch_sizes()


def test_in_coarse_steps_each_latent_has_its_own_time_and_the_sound_its_length() -> None:
    family: Any = family_of(tiny_transformer())
    coords = torch.arange(3 * 2 * 4 * 6 * 2).reshape(1, 3, 48, 2).float()
    prompt = {
        "video_coords": coords,
        "video_size": (2, 4, 6),
        "audio_hidden_states": noise(1, 5, 4),
        "audio_timestep": torch.tensor([750.0]),
    }
    given = family.forward_arguments(noise(1, CHANNELS, 2, 2, 3), torch.tensor([0.6]), prompt)
    assert given["hidden_states"].shape == (1, 12, CHANNELS)
    assert float(given["timestep"]) == pytest.approx(600.0)
    assert float(given["audio_timestep"]) == 750.0
    assert torch.equal(given["audio_hidden_states"], prompt["audio_hidden_states"])
    # The positions of a video of that size: the first two rows and three columns.
    rope = tiny_transformer().rope
    whole, small = (rope.prepare_video_coords(1, 2, *s, "cpu", fps=24) for s in ((4, 6), (2, 3)))
    prompt["video_coords"] = whole
    given = family.forward_arguments(noise(1, CHANNELS, 2, 2, 3), torch.tensor([0.6]), prompt)
    assert torch.equal(given["video_coords"], small)


@pytest.mark.slow
def test_a_captured_run_with_every_kind_of_guidance_equals_the_cpus(graphs: Any) -> None:
    pipelines = [tiny_pipeline(perturbed_attn=True) for _ in range(2)]
    cpu, device = eager(pipelines[0]), captured_by(graphs, pipelines[1])
    call = TestLTX2.case.call((7,), (5,), **EVERY)
    ours, theirs = (both_of(engine, call, patch_policy=MIXED) for engine in (device, cpu))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    stages = {name.partition(" ")[2] for name in graphs.captured}
    assert stages == {"", "negative prompt", "pass 3", "pass 4"}


def test_what_follows_the_loop_makes_video_and_sound(engine: Engine) -> None:
    assert_both_equal(engine, engine.pipeline, TestLTX2.case.call(output_type="pt"))


def test_a_lora_acts_on_the_sound_too() -> None:
    pipeline = tiny_pipeline()
    engine, call = eager(pipeline), TestLTX2.case.call()
    before = both_of(engine, call, patch_policy=FINE)
    engine.load_lora(lora_of(pipeline.transformer, ("audio_attn1.to_out.0",)))
    assert_both_equal(engine, pipeline, call)
    after = both_of(engine, call, patch_policy=FINE)
    assert float((after[1] - before[1]).abs().max()) > 1e-4
    engine.unload_loras()
    again = both_of(engine, call, patch_policy=FINE)
    assert all(torch.equal(one, other) for one, other in zip(again, before, strict=True))


def test_callbacks_may_change_the_video(engine: Engine) -> None:
    def halve(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del time
        return {"latents": tensors["latents"] * 0.5} if step == 2 else {}

    call = TestLTX2.case.call((7,), (5,))
    assert_both_equal(engine, engine.pipeline, call, callback_on_step_end=halve)


def test_what_does_not_fit_is_refused_before_any_work(engine: Engine) -> None:
    call = TestLTX2.case.call()
    with pytest.raises(UnsupportedModelError, match="timesteps.*pass sigmas"):
        engine(**call, timesteps=[900, 500])
    for name in ("stg_scale", "audio_stg_scale", "audio_guidance_scale"):
        with pytest.raises(TypeError, match=f"got {name}='much'"):
            engine(**{**call, name: "much"})
    with pytest.raises(ShapeError, match="8 x 96 pixels; the smallest video is 16 x 16"):
        engine(**{**call, "height": 8})


def test_a_length_that_the_prompt_would_decide_is_refused() -> None:
    pipeline = tiny_pipeline()
    call = TestLTX2.case.call(num_frames=None)
    engine = eager(pipeline)
    pipeline.duration_head = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="predicts them.*pass num_frames"):
        engine(**call)


@pytest.mark.slow
def test_info_says_what_drives_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    size = ["--height", "64", "--width", "96", "--num-frames", "9"]
    assert main(["info", str(tmp_path), *size]) == 0
    text = capsys.readouterr().out
    assert "supported    yes: family ltx2" in text
    assert "driven by    the pipeline's own loop: a soundtrack advances with the video" in text
    assert "64 x 96, 9 frames: latent 3 x 4 x 6" in text
    assert "a step has 4, for guidance" in text
