"""Qwen-Image against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from family_suite import FamilyCase, FamilySuite
from models import noise
from qwen_models import tiny_embeds, tiny_pipeline, tiny_transformer

import ddit_rt
from ddit_rt.errors import ShapeError
from ddit_rt.models import family_of


def guided(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"true_cfg_scale": 4.0, **tiny_embeds(lengths, seed=3, prefix="negative_")}


class TestQwenImage(FamilySuite):
    """Text to image."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided=guided,
        schedulers={
            "constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
            "lightning": lambda: FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=1.0986, max_shift=1.0986, shift_terminal=None
            ),
        },
    )


def test_blocks_are_read_off_with_a_mask_and_without() -> None:
    transformer = tiny_transformer()
    plain, masked = family_of(transformer).block_types(transformer)
    dims = {spec.name: spec.dims for spec in plain.inputs}
    assert dims == {
        "hidden_states": ("batch", "image", 32),
        "encoder_hidden_states": ("batch", "text", 32),
        "temb": ("batch", 32),
        "image_rotary_emb.0": ("image", 8, 2),
        "image_rotary_emb.1": ("text", 8, 2),
    }
    assert {spec.name: spec.dtype for spec in masked.inputs} == {
        **dict.fromkeys(dims, torch.float32),
        "encoder_hidden_states_mask": torch.bool,
    }
    assert (plain.key, masked.key) == (
        "transformer_blocks",
        "transformer_blocks:encoder_hidden_states_mask",
    )
    half = tiny_transformer().bfloat16()
    types = {spec.name: spec.dtype for spec in family_of(half).block_types(half)[0].inputs}
    assert types["temb"] == torch.bfloat16
    assert types["image_rotary_emb.0"] == torch.float32


def test_a_bare_transformer_denoises_from_its_own_arguments() -> None:
    transformer = tiny_transformer()
    engine = ddit_rt.compile(transformer, backend="eager", progress=False)
    embeds = tiny_embeds()["prompt_embeds"]
    final = engine.denoise(
        noise(1, 4, 16, 16),
        num_inference_steps=4,
        patch_policy="2p:0.5,p",
        encoder_hidden_states=embeds,
        negative_encoder_hidden_states=embeds * 0.5,
        guidance_scale=torch.tensor(3.0),
    )
    assert torch.isfinite(final).all()
    with pytest.raises(ShapeError, match=r"`encoder_hidden_states` has shape.*text tokens, 24"):
        engine.denoise(noise(1, 4, 16, 16), encoder_hidden_states=embeds[..., :5])
    with pytest.raises(ValueError, match=r"unknown conditioning \['colour'\]"):
        engine.denoise(noise(1, 4, 16, 16), encoder_hidden_states=embeds, colour=embeds)
