"""Qwen-Image against diffusers' own pipeline."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from family_suite import FamilyCase, LoopSuite
from qwen_models import tiny_embeds, tiny_pipeline, tiny_transformer

from ddit_rt.models import family_of


class TestQwenImage(LoopSuite):
    """Text to image."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided={"true_cfg_scale": 4.0},
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
