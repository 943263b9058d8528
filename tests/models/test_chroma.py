"""Chroma against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chroma_models import tiny_embeds, tiny_pipeline, tiny_transformer
from diffusers import FlowMatchEulerDiscreteScheduler
from family_suite import FamilyCase, FamilySuite, eager
from models import noise

import ddit_rt
from ddit_rt.errors import ShapeError
from ddit_rt.models import family_of

# Diffusers' own, of its own class, whenever a Chroma transformer is made.
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")


def plain(lengths: tuple[int, ...] = (7,), seed: int = 1) -> dict[str, Any]:
    return {"guidance_scale": 1.0, **tiny_embeds(lengths, seed)}


def guided(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"guidance_scale": 5.0, **tiny_embeds(lengths, seed=3, prefix="negative_")}


class TestChroma(FamilySuite):
    """Text to image."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=plain,
        guided=guided,
        schedulers={
            "constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
            "karras": lambda: FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, use_karras_sigmas=True
            ),
        },
    )


def test_both_classes_of_blocks_take_a_modulation_of_their_own_and_the_mask() -> None:
    transformer = tiny_transformer()
    double, single = family_of(transformer).block_types(transformer)
    assert {spec.name: spec.dims for spec in double.inputs} == {
        "hidden_states": ("batch", "image", 32),
        "encoder_hidden_states": ("batch", "text", 32),
        "temb": ("batch", 12, 32),
        "image_rotary_emb.0": ("image+text", 16),
        "image_rotary_emb.1": ("image+text", 16),
        "attention_mask": ("batch", "image+text"),
    }
    assert {spec.name: spec.dims for spec in single.inputs} == {
        "hidden_states": ("batch", "image+text", 32),
        "temb": ("batch", 3, 32),
        "image_rotary_emb.0": ("image+text", 16),
        "image_rotary_emb.1": ("image+text", 16),
        "attention_mask": ("batch", "image+text"),
    }


def test_a_mask_of_booleans_is_refused_before_any_work() -> None:
    engine = eager(tiny_pipeline())
    call = TestChroma.case.call()
    mask = call["prompt_attention_mask"]
    with pytest.raises(TypeError, match=r"`prompt_attention_mask` of torch.bool.*torch.float32"):
        engine(**{**call, "prompt_attention_mask": mask.bool()})


def test_a_bare_transformer_denoises_from_its_own_arguments() -> None:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    embeds, mask = tiny_embeds().values()
    given = {"encoder_hidden_states": embeds, "attention_mask": mask}
    final = engine.denoise(
        noise(1, 4, 16, 16), num_inference_steps=4, patch_policy="2p:0.5,p", **given
    )
    assert torch.isfinite(final).all()
    with pytest.raises(ShapeError, match=r"`attention_mask` has shape.*\[1, text tokens\]"):
        engine.denoise(noise(1, 4, 16, 16), **{**given, "attention_mask": mask[0]})
    with pytest.raises(ValueError, match="`attention_mask` is missing"):
        engine.denoise(noise(1, 4, 16, 16), encoder_hidden_states=embeds)
