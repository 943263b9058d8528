"""LongCat-AudioDiT against diffusers' own pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import assert_equal, relative_error, runs
from family_suite import (
    TOLERANCE,
    WAYS,
    FamilyCase,
    FamilySuite,
    captured_by,
    eager,
    generated,
    trace_of,
)
from longcat_models import CHANNELS, RATE, TEXT_WIDTH, tiny_pipeline, tiny_prompts, tiny_transformer
from models import noise

import ddit_rt
from ddit_rt import DDiTPolicy, StaticPolicy
from ddit_rt.blocks import TokenRanges
from ddit_rt.cli import main
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.steps import Resampling, matched_level


class TestLongCatAudio(FamilySuite):
    """Sizes are 1 and samples; 8 samples are a latent frame."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_prompts,
        guided={"guidance_scale": 3.0},
        sizes=((1, 384), (1, 272)),
        size=lambda _, samples: {"audio_duration_s": samples / RATE},
        fewer=2,
        schedulers={
            "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
        },
        lora=(),
        more={"guidance_scale": 1.0},
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", WAYS, ids=["table", "driven"])
def test_a_length_that_no_patch_divides_runs_at_every_patch(more: Any) -> None:
    """47 latent frames are 24 at 2p and 12 at 4p."""
    pipeline = tiny_pipeline()
    engine = ddit_rt.compile(pipeline, backend="eager", progress=False)
    length = {"audio_duration_s": 47 * 8 / RATE, "num_inference_steps": 6}
    call = TestLongCatAudio.case.call((7, 4), (5, 6), **length)
    assert_equal(*runs(pipeline, engine, call, **more), tolerance=TOLERANCE)
    plan = StaticPolicy(["4p", "2p", "p", "4p", "2p", "p"])
    mixed = generated(engine, call, patch_policy=plan, **more)
    assert mixed.shape == (2, 47, CHANNELS)
    assert torch.isfinite(mixed).all()
    assert [record.tokens for record in trace_of(engine)] == [12, 24, 47, 12, 24, 47]
    generated(engine, call, patch_policy=DDiTPolicy(tau=9.0, fine_tail=1), **more)
    trace = trace_of(engine)
    assert "4p" in trace.patch_sizes()
    assert all(math.isfinite(score) for score in trace[3].scores.values())


def test_such_a_length_is_the_same_on_both_executors(graphs: Any) -> None:
    more = {"patch_sizes": "p,2p,4p"}
    cpu, device = eager(tiny_pipeline(), **more), captured_by(graphs, tiny_pipeline(), **more)
    call = TestLongCatAudio.case.call((7,), (7,), audio_duration_s=47 * 8 / RATE)
    policy = DDiTPolicy(tau={"2p": 9.0, "4p": 1.0}, fine_tail=1)
    ours = generated(device, call, patch_policy=policy)
    assert torch.equal(ours, generated(cpu, call, patch_policy=policy))
    assert trace_of(device).patch_sizes() == trace_of(cpu).patch_sizes()


def test_a_coarse_estimate_follows_a_slow_recording_closely() -> None:
    """Of a recording of low frequencies, 2p sees one at the level that its noise then has."""
    model = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)._compiled.steps
    maps = Resampling.of(model, (1, 48), 2)
    assert maps.small == (1, 24)
    _, level = matched_level(torch.tensor([0.5]), maps.deviation)
    # a = 0.5, b = 0.5 sqrt(1/2): not the 0.25 of a picture.
    assert float(level) == pytest.approx(0.5**1.5 / (0.5 + 0.5**1.5))
    slow = torch.cos(math.pi * (torch.arange(48) + 0.5) / 48).expand(1, CHANNELS, 1, 48)
    assert relative_error(maps.up(maps.down(slow)), slow) < 0.02


@pytest.mark.parametrize("length", [{}, {"audio_duration_s": 99.0}, {"audio_duration_s": 1e-4}])
def test_lengths_are_the_pipelines_own(length: dict[str, float]) -> None:
    """Guessed from the texts, cut to the longest, and at least a frame."""
    pipeline = tiny_pipeline()
    pipeline.max_wav_duration = 0.9
    call = TestLongCatAudio.case.call((9, 6), **length)
    if not length:
        del call["audio_duration_s"]
    engine = ddit_rt.compile(
        pipeline, ranges=TokenRanges(image=(1, 512)), backend="eager", progress=False
    )
    ours, theirs = runs(pipeline, engine, call)
    assert ours.shape[1] == (57 if not length else 90 if length["audio_duration_s"] > 1 else 1)
    assert_equal(ours, theirs, tolerance=TOLERANCE)


def test_given_latents_say_the_length() -> None:
    pipeline = tiny_pipeline()
    engine, call = eager(pipeline), TestLongCatAudio.case.call((7,), (7,))
    assert_equal(*runs(pipeline, engine, {**call, "latents": noise(1, 30, CHANNELS)}), TOLERANCE)
    with pytest.raises(ShapeError, match=r"`latents` has shape \[1, 4, 30\].*prompts, frames, 4"):
        engine(**call, latents=noise(1, CHANNELS, 30))


@pytest.mark.parametrize(
    "config",
    [{"adaln_type": "local"}, {"text_conv": False}, {"use_latent_condition": False}],
    ids=lambda config: next(iter(config)),
)
def test_variants_of_the_class_equal_diffusers(config: dict[str, Any]) -> None:
    pipeline = tiny_pipeline(**config)
    engine, call = eager(pipeline), TestLongCatAudio.case.call((7, 4), (5, 6))
    assert_equal(*runs(pipeline, engine, call), tolerance=TOLERANCE)


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="height=64.*size is audio_duration_s"):
        ddit_rt.compile(pipeline, height=64, backend="eager", progress=False)
    engine, call = eager(pipeline), TestLongCatAudio.case.call()
    for wrong in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"audio_duration_s={wrong}"):
            engine(**{**call, "audio_duration_s": wrong})
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnsupportedModelError, match="without invert_sigmas=True"):
        engine(**call)


def test_latents_of_more_than_one_row_are_refused() -> None:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    text, mask = noise(1, 7, TEXT_WIDTH), torch.ones(1, 7, dtype=torch.bool)
    given = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    with pytest.raises(ShapeError, match=r"shape \[1, 4, 5, 10\]; expected \[B, 4, 1, T\]"):
        engine.denoise(noise(1, CHANNELS, 5, 10), **given)


@pytest.mark.filterwarnings("ignore:.*weight_norm")  # diffusers uses torch's older one
def test_info_counts_lengths_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--audio-duration-s", "2"]) == 0
    text = capsys.readouterr().out
    assert "supported    yes: family longcat-audio" in text
    assert "30.00 s: latent 1 x 3000" in text
    assert "2.00 s: latent 1 x 200" in text
    assert "50 tokens" in text  # at 4p
    assert main(["info", str(tmp_path), "--height", "64"]) == 2
    assert "size is audio_duration_s" in capsys.readouterr().err
