"""Wan VACE against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from driving import assert_equal, runs
from family_suite import CACHE, MIXED, WAYS, FamilyCase, eager, generated, trace_of
from models import noise, seeded
from wan_image_models import (
    BOUNDARY,
    GUIDED,
    VIDEO,
    WanSuite,
    embeds,
    vace_pipeline,
    with_video,
)
from wan_models import euler

from ddit_rt import DDiTPolicy
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.wan_vace import WanVACEFamily
from ddit_rt.planning.request import Request


class TestWanVACE(WanSuite):
    """One transformer, with a control video, a mask and a reference picture."""

    case = FamilyCase(
        pipeline=vace_pipeline,
        prompts=embeds,
        guided=GUIDED,
        inputs=with_video,
        sizes=((64, 96), (64, 96)),
        schedulers={"euler": euler},
        batch=1,
        more=VIDEO,
    )


ALONE = {"video": None, "mask": None, "reference_images": None, "conditioning_scale": 1.0}
"""Text alone: VACE then makes all of the video."""


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(ALONE, id="text"),
        pytest.param({"mask": None}, id="video", marks=pytest.mark.slow),
        pytest.param({"reference_images": None}, id="video and mask"),
        pytest.param({"video": None, "mask": None}, id="reference", marks=pytest.mark.slow),
    ],
)
def test_whatever_is_given_equals_diffusers(given: Any) -> None:
    pipeline = vace_pipeline()
    engine, call = eager(pipeline), TestWanVACE.case.call((7,), (5,), **given)
    for driven in WAYS:
        assert_equal(*runs(pipeline, engine, call, **driven), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("driven", WAYS, ids=["table", "driven"])
def test_two_experts_equal_diffusers_where_no_patch_divides(driven: Any) -> None:
    pipeline = vace_pipeline(boundary_ratio=BOUNDARY)
    video = {**with_video(height=80, width=112), "height": 80, "width": 112}
    video |= {"guidance_scale_2": 2.0, "num_inference_steps": 6}
    call = TestWanVACE.case.call((7,), (5,), **video)
    engine = eager(pipeline, patch_sizes="p,2p,4p")
    assert_equal(*runs(pipeline, engine, call, **driven), tolerance=1e-5)
    for policy in ("4p:0.4,2p:0.3,p", DDiTPolicy(tau=1.0, fine_tail=1)):
        assert torch.isfinite(generated(engine, call, patch_policy=policy, **driven)).all()
        assert "4p" in trace_of(engine).patch_sizes()


def test_the_model_sees_a_smaller_control_video() -> None:
    videos, white = noise(1, 8, 3, 8, 12), torch.zeros(1, 1, 3, 64, 96)
    white[..., 44:] = 1
    rows = white.unflatten(3, (8, 8)).unflatten(5, (12, 8)).permute(0, 4, 6, 1, 2, 3, 5)
    control = torch.cat((videos, rows.flatten(1, 3)), dim=1)
    given = {"encoder_hidden_states": noise(1, 5, 24), "control_hidden_states": control}
    args = WanVACEFamily().forward_arguments(noise(1, 4, 3, 4, 6), torch.tensor([0.5]), given)
    small = args["control_hidden_states"]
    assert small.shape == (1, 72, 3, 4, 6)
    torch.testing.assert_close(small[:, :8, 1], F.avg_pool2d(videos[:, :, 1], 2))
    # Column 44 of 96 is column 22 of 48: six in the third latent pixel of 8.
    expected = torch.tensor([0] * 22 + [1] * 26).float()
    pixels = small[:, 8:].unflatten(1, (8, 8)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
    assert torch.equal(pixels, expected.expand_as(pixels))


def test_a_step_that_reuses_adds_all_that_lies_between_the_blocks() -> None:
    """What the control adds between the blocks too, and that once."""
    engine = eager(vace_pipeline())
    request = Request(policy=MIXED, step_cache=CACHE)
    plan, latents = engine.plan_call(request, **TestWanVACE.case.call(), generator=seeded())
    step = torch.zeros(1, dtype=torch.int64)
    for bucket in plan.buckets[0]:
        assert bucket is not None
        computed = bucket.velocity(latents, step)
        assert_equal(bucket.velocity(latents, step, reuse=True), computed, tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_videos_per_prompt": 2}, "got 2 prompts or videos.*one video in a call"),
        (embeds((7, 4)), "got 2 prompts or videos"),
        (with_video(height=32, width=48), r"control video is \[4, 4, 6\].*are \[4, 8, 12\]"),
        ({"num_frames": 5}, r"control video is \[4, 8, 12\].*are \[3, 8, 12\]"),
    ],
    ids=["two videos", "two prompts", "a smaller video", "a longer video"],
)
@pytest.mark.filterwarnings("ignore")
def test_calls_that_do_not_fit_are_named(change: Any, message: str) -> None:
    engine = eager(vace_pipeline())
    for more in WAYS:
        with pytest.raises((ValueError, ShapeError), match=message):
            generated(engine, {**TestWanVACE.case.call(), **change}, **more)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vace_in_channels": 70}, r"vace_in_channels=70 \(expected .* 8, and a square"),
        ({"out_channels": 8}, "in_channels=4 and out_channels=8"),
        ({"image_dim": 20}, "image_dim"),
        ({"num_layers": 3}, "control behind the last block"),
    ],
)
def test_models_that_do_not_fit_are_named(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"no WanVACEPipeline of .*{message}"):
        eager(vace_pipeline(**config))
