"""FLUX.2 against diffusers' own pipelines."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import assert_equal, keep, relative_error, runs
from family_suite import (
    MIXED,
    TOLERANCE,
    FamilyCase,
    FamilySuite,
    eager,
    generated,
    trace_of,
)
from flux2_models import CHANNELS, tiny_dev, tiny_embeds, tiny_klein, tiny_transformer, tiny_vae
from models import noise
from PIL import Image

import ddit_rt
from ddit_rt import StaticPolicy, TokenRanges
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.loop import CudaExecutor
from ddit_rt.models import family_of
from ddit_rt.models.flux2 import Flux2Family
from ddit_rt.steps.buckets import Resampling

LORA = ("to_out.0", "attn.to_out")


UNGUIDED = {"guidance_scale": 1.0}


def guided(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"guidance_scale": 4.0, **tiny_embeds(lengths, seed=3, prefix="negative_")}


class TestKlein(FamilySuite):
    """klein as a base model: with guidance and without."""

    case = FamilyCase(
        pipeline=tiny_klein,
        prompts=tiny_embeds,
        guided=guided,
        schedulers={"constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)},
        lora=LORA,
        more=UNGUIDED,
    )


class TestDistilledKlein(FamilySuite):
    """klein in a few steps; its pipeline ignores a guidance scale."""

    case = FamilyCase(
        pipeline=partial(tiny_klein, is_distilled=True),
        prompts=tiny_embeds,
        guided=None,
        lora=LORA,
    )


class TestDev(FamilySuite):
    """dev: guidance is embedded."""

    case = FamilyCase(pipeline=tiny_dev, prompts=tiny_embeds, guided=None, lora=LORA)


def test_blocks_are_read_off() -> None:
    transformer = tiny_transformer()
    double, single = family_of(transformer).block_types(transformer)
    assert {spec.name: spec.dims for spec in double.inputs} == {
        "hidden_states": ("batch", "image", 32),
        "encoder_hidden_states": ("batch", "text", 32),
        "temb_mod_img": ("batch", 192),
        "temb_mod_txt": ("batch", 192),
        "image_rotary_emb.0": ("image+text", 16),
        "image_rotary_emb.1": ("image+text", 16),
    }
    assert {spec.name: spec.dims for spec in single.inputs} == {
        "hidden_states": ("batch", "image+text", 32),
        "temb_mod": ("batch", 96),
        "image_rotary_emb.0": ("image+text", 16),
        "image_rotary_emb.1": ("image+text", 16),
    }


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
    "dev": (TestDev, ()),
    "distilled": (TestDistilledKlein, ()),
    "guided": (TestKlein, (7,)),
    "guided apart": (TestKlein, (5,)),
}


@pytest.mark.parametrize("more", [{}, {"callback_on_step_end": keep}], ids=["table", "driven"])
@pytest.mark.parametrize("suite", EDITS)
def test_edits_by_reference_images_equal_diffusers(suite: str, more: dict[str, Any]) -> None:
    kind, negative = EDITS[suite]
    pipeline = kind.case.pipeline()
    engine = eager(pipeline, patch_sizes="p,2p,4p")
    references = [picture(1), picture(2, 80, 64)]
    call = kind.case.call((7,), negative, image=references, height=128, width=128)
    assert_equal(*runs(pipeline, engine, call, **more), tolerance=TOLERANCE)
    plan = StaticPolicy(["4p", "2p", "p", "4p"])
    one = generated(engine, call, patch_policy=plan, **more)
    assert trace_of(engine).patch_sizes() == ["4p", "2p", "p", "4p"]
    other = generated(engine, {**call, "image": [picture(3)]}, patch_policy=plan, **more)
    # A random VAE tells pictures but little apart: far above rounding is what can be asked.
    assert relative_error(one, other) > 20 * TOLERANCE


def test_edits_are_the_same_on_both_executors(graphs: Any) -> None:
    cpu, device = eager(tiny_klein()), eager(tiny_klein())
    device._loop.executor = CudaExecutor(graphs)
    for size in (64, 80):
        call = TestKlein.case.call((7,), (7,), image=picture(1, size))
        ours = generated(device, call, patch_policy=MIXED)
        assert torch.equal(ours, generated(cpu, call, patch_policy=MIXED))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 96), (70, 100), (1400, 1000)])
def test_an_edit_without_a_size_has_that_of_its_first_image(size: tuple[int, int]) -> None:
    pipeline = tiny_klein(is_distilled=True)
    call = TestDistilledKlein.case.call(image=[picture(1, *size), picture(2)])
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


@pytest.mark.parametrize("steps", [4, 5])
def test_a_coarse_prefix_works_in_few_steps(steps: int) -> None:
    engine = eager(tiny_klein(is_distilled=True))
    engine(
        **tiny_embeds(), height=64, width=64, num_inference_steps=steps, patch_policy="2p:0.25,p"
    )
    trace = engine.last_trace
    assert trace is not None
    assert trace.patch_sizes() == ["2p", *["p"] * (steps - 1)]


def test_a_bare_transformer_denoises_from_its_own_arguments() -> None:
    engine = ddit_rt.compile(
        tiny_transformer(guidance_embeds=True), backend="eager", progress=False
    )
    prompt = tiny_embeds()["prompt_embeds"]
    final = engine.denoise(
        noise(1, CHANNELS, 16, 16),
        num_inference_steps=4,
        patch_policy="2p:0.5,p",
        encoder_hidden_states=prompt,
        guidance=torch.tensor([4.0]),
    )
    assert torch.isfinite(final).all()
    with pytest.raises(ValueError, match="`guidance` is missing"):
        engine.denoise(noise(1, CHANNELS, 16, 16), encoder_hidden_states=prompt)
