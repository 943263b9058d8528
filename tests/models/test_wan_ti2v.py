"""Wan 2.2 TI2V 5B against diffusers' own pipelines: a timestep for each token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline, WanPipeline
from driving import FINE, assert_equal, runs
from family_suite import MIXED, WAYS, FamilyCase, captured_by, eager, generated, trace_of
from models import noise, seeded
from wan_image_models import GUIDED, VIDEO, WanSuite, embeds, picture, ti2v_pipeline, with_picture
from wan_models import euler, wan_transformer

from ddit_rt import DDiTPolicy
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.wan_ti2v import WanTI2VFamily

SIZE = (128, 192)
"""4 x 6 tokens."""
ODD = (160, 224)
"""5 x 7 tokens: neither 2p nor 4p divides them."""


class TestWanTI2V(WanSuite):
    """Image to video."""

    case = FamilyCase(
        pipeline=ti2v_pipeline,
        prompts=embeds,
        guided=GUIDED,
        inputs=with_picture,
        sizes=(SIZE, ODD),
        schedulers={"euler": euler},
        more=VIDEO,
    )


def test_what_the_model_sees_of_the_first_frame_is_the_picture_at_time_0() -> None:
    family, latents = WanTI2VFamily(), noise(2, 48, 3, 8, 12)
    given = {"encoder_hidden_states": noise(2, 5, 24), "condition": noise(2, 48, 1, 16, 24, seed=2)}
    seen = family.forward_arguments(latents, torch.tensor([0.75]), given)
    small = F.avg_pool2d(given["condition"][:, :, 0], 2)
    torch.testing.assert_close(seen["hidden_states"][:, :, 0], small)
    assert torch.equal(seen["hidden_states"][:, :, 1:], latents[:, :, 1:])
    times = torch.cat((torch.zeros(24), torch.full((48,), 750.0)))
    assert torch.equal(seen["timestep"], times.expand(2, -1))


def test_a_call_of_the_model_is_read_by_the_time_that_is_not_the_pictures() -> None:
    pipeline, shape = ti2v_pipeline(), (1, 48, 3, 4, 6)
    given = {
        "hidden_states": noise(*shape),
        "timestep": torch.tensor([[0.0] * 6 + [937.0] * 12]),
        "encoder_hidden_states": noise(1, 5, 32),
    }
    call = WanTI2VFamily().read_model_call(pipeline.transformer, shape, given)
    assert call.timestep.tolist() == [0.937]
    assert torch.equal(call.conditioning["condition"], given["hidden_states"][:, :, :1])


@pytest.mark.parametrize("driven", WAYS, ids=["table", "driven"])
def test_noise_in_the_first_frame_changes_nothing(driven: Any) -> None:
    """In coarse steps too, that frame is the picture, and it is what comes out."""
    engine, call = eager(ti2v_pipeline()), TestWanTI2V.case.call((7,), (5,))
    latents = noise(1, 48, 3, 8, 12)
    others = torch.cat((noise(1, 48, 1, 8, 12, seed=9), latents[:, :, 1:]), dim=2)
    more = {"patch_policy": MIXED, **driven}
    first, second = (generated(engine, call, latents=one, **more) for one in (latents, others))
    assert torch.equal(first, second)
    fine = generated(engine, call, latents=latents, patch_policy=FINE)
    assert torch.equal(first[:, :, 0], fine[:, :, 0])


def test_a_last_frame_is_said_to_be_ignored() -> None:
    engine = eager(ti2v_pipeline())
    with pytest.warns(UserWarning, match="last_image is ignored"):
        generated(engine, TestWanTI2V.case.call(last_image=picture(2)))


@pytest.mark.parametrize("kind", [WanImageToVideoPipeline, WanPipeline])
def test_coarse_steps_run_where_no_patch_divides(kind: type) -> None:
    engine = eager(ti2v_pipeline(kind), patch_sizes="p,2p,4p")
    call = call_of(kind, num_inference_steps=8, height=ODD[0], width=ODD[1])
    for policy in ("4p:0.5,p", DDiTPolicy(tau=1.0, fine_tail=1)):
        assert torch.isfinite(generated(engine, call, patch_policy=policy)).all()
        assert "4p" in trace_of(engine).patch_sizes()


def call_of(kind: type, negative: tuple[int, ...] = (7,), **more: Any) -> dict[str, Any]:
    """Of image to video, or of text to video, which takes no picture."""
    call = TestWanTI2V.case.call((7,), negative, **more)
    if kind is WanPipeline:
        del call["image"]
    return call


@pytest.mark.parametrize(("size", "negative"), [(SIZE, (7,)), (ODD, ())], ids=["guided", "odd"])
def test_text_to_video_equals_diffusers(size: Any, negative: Any) -> None:
    pipeline = ti2v_pipeline(WanPipeline)
    engine, call = eager(pipeline), call_of(WanPipeline, negative, height=size[0], width=size[1])
    for driven in WAYS:
        assert_equal(*runs(pipeline, engine, call, **driven), tolerance=1e-5)


def test_text_to_video_is_decoded_as_diffusers_does() -> None:
    pipeline, call = ti2v_pipeline(WanPipeline), call_of(WanPipeline, output_type="np")
    ours = eager(pipeline)(**call, generator=seeded(), patch_policy=FINE).frames
    np.testing.assert_allclose(ours, pipeline(**call, generator=seeded()).frames, atol=1e-4)


def test_captured_text_to_video_equals_the_cpus_to_the_bit(graphs: Any) -> None:
    cpu = eager(ti2v_pipeline(WanPipeline))
    device = captured_by(graphs, ti2v_pipeline(WanPipeline))
    ours, theirs = (
        generated(one, call_of(WanPipeline), patch_policy=MIXED) for one in (device, cpu)
    )
    assert torch.equal(ours, theirs)


def test_sizes_are_multiples_of_32() -> None:
    with pytest.raises(ShapeError, match="multiples of 32, such as 128 x 192"):
        generated(eager(ti2v_pipeline()), TestWanTI2V.case.call(height=144))


def test_models_that_do_not_fit_are_named() -> None:
    pipeline = ti2v_pipeline()
    for config, message in (
        ({"in_channels": 100, "out_channels": 48}, "in_channels=100 and out_channels=48"),
        ({"in_channels": 48, "out_channels": 48, "image_dim": 20}, "image_dim"),
    ):
        pipeline.register_modules(transformer=wan_transformer(**config))
        with pytest.raises(UnsupportedModelError, match=f"expand_timesteps.*{message}"):
            eager(pipeline)
