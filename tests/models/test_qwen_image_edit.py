"""Qwen-Image-Edit against diffusers' own pipelines."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from driving import assert_equal, relative_error, runs
from family_suite import MIXED, TOLERANCE, WAYS, FamilyCase, FamilySuite, eager, generated
from models import noise
from PIL import Image
from qwen_models import tiny_edit_pipeline, tiny_embeds, tiny_transformer

import ddit_rt
from ddit_rt.errors import UnsupportedModelError


def picture(seed: int = 5, size: tuple[int, int] = (40, 60)) -> Image.Image:
    """A random picture of a width and a height."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def _small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of some 64 x 64 pixels, where the pipelines make them of 1024 x 1024."""
    for pipeline in (QwenImageEditPipeline, QwenImageEditPlusPipeline):
        module = sys.modules[pipeline.__module__]
        own = module.calculate_dimensions  # type: ignore[attr-defined]
        small = lambda _, ratio, own=own: own(64 * 64, ratio)  # noqa: E731
        monkeypatch.setattr(module, "calculate_dimensions", small)


class TestQwenImageEdit(FamilySuite):
    """One picture to edit."""

    case = FamilyCase(
        pipeline=tiny_edit_pipeline,
        prompts=tiny_embeds,
        guided={"true_cfg_scale": 4.0},
        more={"image": picture(), "true_cfg_scale": 1.0},
    )
    test_compiled_blocks_equal_diffusers = None  # packages are those of text to image


def test_several_pictures_equal_diffusers() -> None:
    pipeline = tiny_edit_pipeline(QwenImageEditPlusPipeline)
    engine = eager(pipeline)
    case = TestQwenImageEdit.case
    call = case.call((7,), (5,), image=[picture(), picture(6, (80, 30))])
    for more in WAYS:
        assert_equal(*runs(pipeline, engine, call, **more), tolerance=TOLERANCE)
    assert torch.isfinite(generated(engine, call, patch_policy=MIXED)).all()


def test_the_size_of_a_call_without_one_is_its_pictures() -> None:
    pipeline = tiny_edit_pipeline()
    engine = eager(pipeline)
    call = TestQwenImageEdit.case.call(height=None, width=None)
    assert_equal(*runs(pipeline, engine, call), tolerance=TOLERANCE)


def test_another_picture_gives_another_result_in_fine_and_in_coarse_steps() -> None:
    engine = eager(tiny_edit_pipeline())
    call = TestQwenImageEdit.case.call()
    for policy in ("p", "2p:0.5,p"):
        one, other = (
            generated(engine, call | {"image": Image.new("RGB", size, colour)}, patch_policy=policy)
            for size, colour in (((40, 60), "white"), ((60, 40), "black"))
        )
        # A random VAE tells pictures but little apart: far above rounding is what can be asked.
        assert relative_error(one, other) > 20 * TOLERANCE


def test_times_side_by_side_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="zero_cond_t"):
        ddit_rt.compile(tiny_transformer(zero_cond_t=True), backend="eager", progress=False)


def test_a_bare_transformer_takes_reference_tokens() -> None:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    given = {
        "encoder_hidden_states": tiny_embeds()["prompt_embeds"],
        "reference_tokens": noise(1, 24, 16),
        "reference_shapes": ((1, 4, 6),),
    }
    final = engine.denoise(noise(1, 4, 16, 16), num_inference_steps=4, patch_policy="p", **given)
    assert torch.isfinite(final).all()
