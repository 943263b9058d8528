"""FLUX's pipelines that start from pictures, against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import FINE, assert_equal, keep, runs
from family_suite import MIXED, WAYS, FamilyCase, FamilySuite, eager, generated, trace_of
from flux_edit_models import embeds, fill, img2img, inpaint, kontext, mask, picture
from models import tiny_pipeline, tiny_transformer

import ddit_rt
from ddit_rt.artifact import mismatches
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models import family_of
from ddit_rt.models.smaller import smaller_both
from ddit_rt.ops import pack

GUIDED = {"true_cfg_scale": 3.0}
SCHEDULERS = {"constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)}


class TestImg2Img(FamilySuite):
    """Image to image."""

    case = FamilyCase(
        pipeline=img2img,
        prompts=embeds,
        guided=GUIDED,
        inputs=lambda seed: {"image": picture(seed)},
        schedulers=SCHEDULERS,
        more={"strength": 1.0},  # so that all steps are left, which the suite counts
    )


class TestKontext(FamilySuite):
    """Editing by reference."""

    case = FamilyCase(
        pipeline=kontext,
        prompts=embeds,
        guided=GUIDED,
        inputs=lambda seed: {"image": picture(seed, 48, 64)},  # of another size than what is made
        sizes=((64, 96), (96, 64)),
        schedulers=SCHEDULERS,
        more={"max_area": 64 * 96, "_auto_resize": False},
    )
    test_compiled_blocks_equal_diffusers = None  # packages are those of image to image


class TestFill(FamilySuite):
    """In- and outpainting."""

    case = FamilyCase(
        pipeline=fill,
        prompts=embeds,
        inputs=lambda seed: {"image": picture(seed), "mask_image": mask()},
        schedulers=SCHEDULERS,
    )
    test_compiled_blocks_equal_diffusers = None  # packages are those of image to image


@pytest.mark.parametrize("more", WAYS, ids=["table", "driven"])
def test_strength_cuts_the_schedule_as_diffusers_does(more: Any) -> None:
    pipeline = img2img()
    engine = eager(pipeline)
    for strength, steps in ((0.5, 3), (0.7, 5), (0.9, 6)):
        call = TestImg2Img.case.call((7,), (7,), strength=strength, num_inference_steps=6)
        assert_equal(*runs(pipeline, engine, call, **more), tolerance=1e-5)
        assert len(trace_of(engine)) == steps
        assert trace_of(engine).executor == ("pipeline-cpu" if more else "cpu")


def test_coarse_steps_of_a_cut_schedule_agree_in_both_ways() -> None:
    engine = eager(img2img())
    call = TestImg2Img.case.call(strength=0.7, patch_policy="2p:0.5,p")
    table = generated(engine, call)
    assert trace_of(engine).patch_sizes()[:2] == ["2p", "2p"]
    assert_equal(generated(engine, call, callback_on_step_end=keep), table, tolerance=1e-5)


def test_no_strength_leaves_no_step() -> None:
    with pytest.raises(ValueError, match=r"strength=0\.0 for 4 steps, of which none is left"):
        generated(eager(img2img()), TestImg2Img.case.call(strength=0.0))
    with pytest.raises(ValueError, match="strength"):
        generated(eager(img2img()), TestImg2Img.case.call(strength=1.5))


@pytest.mark.parametrize("negative", [(), (7,)], ids=["", "guided"])
def test_inpainting_is_driven_by_the_pipelines_own_loop(negative: tuple[int, ...]) -> None:
    pipeline = inpaint()
    engine = eager(pipeline)
    call = {**TestImg2Img.case.call((7,), negative), "mask_image": mask(), "strength": 0.8}
    with pytest.warns(UserWarning, match="puts the image back outside the mask"):
        ours, theirs = runs(pipeline, engine, call)
    assert_equal(ours, theirs, tolerance=1e-5)
    assert trace_of(engine).executor == "pipeline-cpu"
    coarse = generated(engine, call, patch_policy="2p:0.5,p")
    assert torch.isfinite(coarse).all()
    assert "2p" in trace_of(engine).patch_sizes()
    # What the mask keeps is the same picture.
    untouched = coarse[:, :5], theirs[:, :5]
    assert_equal(*untouched, tolerance=1e-5)


def test_kontext_without_a_reference_is_text_to_image() -> None:
    pipeline = kontext()
    engine = eager(pipeline)
    call = TestKontext.case.call()
    del call["image"]
    assert_equal(*runs(pipeline, engine, call), tolerance=1e-5)


def test_references_act_in_coarse_steps_as_they_are() -> None:
    engine = eager(kontext())
    call = TestKontext.case.call(patch_policy=MIXED)
    one = generated(engine, call)
    other = generated(engine, {**call, "image": picture(9, 48, 64)})
    assert float((one - other).abs().max()) > 1e-3
    family = family_of(engine.pipeline.transformer, engine.pipeline)
    reference, ids = torch.randn(1, 12, 16), torch.ones(12, 3)
    arguments = {
        "encoder_hidden_states": torch.zeros(1, 7, 24),
        "reference_tokens": reference,
        "reference_ids": ids,
    }
    given = family.forward_arguments(torch.zeros(1, 4, 8, 12), torch.ones(1), arguments)
    assert torch.equal(given["hidden_states"][:, 24:], reference)
    assert torch.equal(given["img_ids"][24:], ids)


def test_references_count_among_the_compiled_tokens() -> None:
    engine = eager(kontext(), height=64, width=96, ranges=ddit_rt.TokenRanges(image=(4, 100)))
    with pytest.raises(ShapeError, match="number of image tokens of 144"):
        generated(engine, TestKontext.case.call(), patch_policy=FINE)


def test_a_smaller_mask_is_that_of_the_smaller_picture() -> None:
    pixels = torch.zeros(1, 1, 32, 48)
    pixels[..., 8:24, 16:40] = 1
    latent = torch.nn.functional.pixel_unshuffle(pixels, 4)
    shown = torch.randn(1, 4, 8, 12)
    small = smaller_both(torch.cat((shown, latent), dim=1), 4, (4, 6))
    expected = torch.nn.functional.pixel_unshuffle(pixels[..., ::2, ::2], 4)
    assert torch.equal(small[:, 4:], expected)
    assert torch.allclose(small[:, :4], torch.nn.functional.avg_pool2d(shown, 2))
    assert pack(small.contiguous(), 2).shape == (1, 6, 80)


def test_what_does_not_fit_is_refused_by_name() -> None:
    wide = tiny_transformer(in_channels=96, out_channels=16)
    with pytest.raises(UnsupportedModelError, match="compile a FluxFillPipeline"):
        ddit_rt.compile(wide, backend="eager", progress=False)
    pipeline = fill()
    pipeline.transformer = tiny_transformer()
    with pytest.raises(UnsupportedModelError, match="use FLUX.1-Fill"):
        eager(pipeline)
    pipeline = img2img()
    pipeline.transformer = wide
    with pytest.raises(UnsupportedModelError, match="put one with further channels"):
        eager(pipeline)


def test_an_artifact_of_another_kind_of_pipeline_does_not_fit() -> None:
    manifest = eager(tiny_pipeline()).artifact.manifest
    (problem,) = mismatches(manifest, tiny_transformer(), family="flux-kontext")
    assert problem == "pipeline: compiled for flux, got one of flux-kontext; compile that"


def test_krea_is_a_flux_pipeline_with_distilled_guidance() -> None:
    pipeline = tiny_pipeline(guidance_embeds=True)
    assert family_of(pipeline.transformer, pipeline).name == "flux"
    call = {**TestKontext.case.call(guidance_scale=4.5), **embeds()}
    call = {name: call[name] for name in call.keys() - {"image", *TestKontext.case.more}}
    assert_equal(*runs(pipeline, eager(pipeline), call), tolerance=1e-5)
