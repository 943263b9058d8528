"""FLUX.2 against diffusers' own pipelines."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import assert_equal, relative_error, runs
from family_suite import (
    MIXED,
    TOLERANCE,
    WAYS,
    FamilyCase,
    FamilySuite,
    LoopSuite,
    captured_by,
    eager,
    generated,
    trace_of,
)
from flux2_models import CHANNELS, tiny_dev, tiny_embeds, tiny_klein, tiny_vae
from models import noise
from PIL import Image

import ddit_rt
from ddit_rt import StaticPolicy, TokenRanges
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models.flux2 import Flux2Family
from ddit_rt.steps.buckets import Resampling

LORA = ("to_out.0", "attn.to_out")
UNGUIDED = {"guidance_scale": 1.0}
DISTILLED = FamilyCase(pipeline=partial(tiny_klein, is_distilled=True), prompts=tiny_embeds)
"""klein in a few steps; its pipeline ignores a guidance scale."""


class TestKlein(FamilySuite):
    """klein as a base model: with guidance and without."""

    case = FamilyCase(
        pipeline=tiny_klein,
        prompts=tiny_embeds,
        guided={"guidance_scale": 4.0},
        schedulers={"constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)},
        lora=LORA,
        more=UNGUIDED,
    )


class TestDev(LoopSuite):
    """dev: guidance is embedded."""

    case = FamilyCase(pipeline=tiny_dev, prompts=tiny_embeds, lora=LORA)
    test_compiled_blocks_equal_diffusers = None  # packages are klein's


def test_the_reduced_latent_is_that_behind_the_norm_and_its_noise_is_white() -> None:
    family, vae = Flux2Family(), tiny_vae()
    for norm in (vae.bn.running_mean, vae.bn.running_var):
        norm.copy_(norm.view(CHANNELS, 4).mean(1, keepdim=True).expand(-1, 4).flatten())

    def normalised(latents: Any) -> Any:
        packed = torch.nn.functional.pixel_unshuffle(latents, 2)
        return torch.nn.functional.pixel_shuffle(vae.bn(packed), 2)

    cpu = torch.device("cpu")
    small = Resampling((16, 24), (8, 14), cpu)
    clean = noise(2, CHANNELS, 16, 24) * 3 + 1
    torch.testing.assert_close(small.down(normalised(clean)), normalised(small.down(clean)))
    tokens = noise(1, 64 * 64, 4 * CHANNELS)
    small = Resampling((128, 128), (64, 64), cpu)
    low = small.down(family.unpack_latents(tokens, (1, CHANNELS, 128, 128)))
    assert float(low.std()) == pytest.approx(small.deviation, rel=0.02)
    assert float((low[..., 1:] * low[..., :-1]).mean()) == pytest.approx(0, abs=0.01)


def test_a_norm_that_differs_from_place_to_place_is_refused() -> None:
    for name in ("running_mean", "running_var"):
        pipeline = tiny_klein()
        getattr(pipeline.vae.bn, name)[5] += 1
        with pytest.raises(UnsupportedModelError, match=r"batch norm .*differs by .* std"):
            eager(pipeline)


def picture(seed: int, width: int = 64, height: int = 96) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


EDITS = {
    "dev": (TestDev.case, ()),
    "distilled": (DISTILLED, ()),
    "guided": (TestKlein.case, (7,)),
    "guided apart": (TestKlein.case, (5,)),
}


@pytest.mark.parametrize("more", WAYS, ids=["table", "driven"])
@pytest.mark.parametrize("suite", EDITS)
def test_edits_by_reference_images_equal_diffusers(suite: str, more: dict[str, Any]) -> None:
    case, negative = EDITS[suite]
    pipeline = case.pipeline()
    engine = eager(pipeline, patch_sizes="p,2p,4p")
    references = [picture(1), picture(2, 80, 64)]
    call = case.call((7,), negative, image=references, height=128, width=128)
    assert_equal(*runs(pipeline, engine, call, **more), tolerance=TOLERANCE)
    plan = StaticPolicy(["4p", "2p", "p", "4p"])
    one = generated(engine, call, patch_policy=plan, **more)
    assert trace_of(engine).patch_sizes() == ["4p", "2p", "p", "4p"]
    other = generated(engine, {**call, "image": [picture(3)]}, patch_policy=plan, **more)
    # A random VAE tells pictures but little apart: far above rounding is what can be asked.
    assert relative_error(one, other) > 20 * TOLERANCE


def test_edits_are_the_same_on_both_executors(graphs: Any) -> None:
    cpu, device = eager(tiny_klein()), captured_by(graphs, tiny_klein())
    for size in (64, 80):
        call = TestKlein.case.call((7,), (7,), image=picture(1, size))
        ours = generated(device, call, patch_policy=MIXED)
        assert torch.equal(ours, generated(cpu, call, patch_policy=MIXED))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 96), (70, 100), (1400, 1000)])
def test_an_edit_without_a_size_has_that_of_its_first_image(size: tuple[int, int]) -> None:
    pipeline = DISTILLED.pipeline()
    call = DISTILLED.call(image=[picture(1, *size), picture(2)])
    call |= {"height": None, "width": None, "num_inference_steps": 1}
    assert_equal(*runs(pipeline, eager(pipeline), call), tolerance=TOLERANCE)


def test_references_count_among_the_compiled_tokens() -> None:
    engine = eager(tiny_klein(), height=64, width=96, ranges=TokenRanges(image=(4, 40)))
    with pytest.raises(ShapeError, match="number of image tokens of 48"):
        generated(engine, TestKlein.case.call(image=picture(1)))


def test_latents_are_taken_as_the_pipeline_takes_them() -> None:
    pipeline = tiny_klein()
    latents = noise(1, 4 * CHANNELS, 4, 6)
    call = {**UNGUIDED, **tiny_embeds(), "height": 64, "width": 96, "num_inference_steps": 4}
    more = {"latents": latents, "output_type": "latent"}
    ours = eager(pipeline)(**call, **more, patch_policy=ddit_rt.FinePolicy()).images
    torch.testing.assert_close(ours, pipeline(**call, **more).images, rtol=0, atol=1e-5)
