"""Z-Image against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import assert_equal, runs
from family_suite import (
    MIXED,
    TOLERANCE,
    WAYS,
    FamilyCase,
    FamilySuite,
    captured_by,
    eager,
    generated,
)
from z_image_models import TEXT_WIDTH, tiny_embeds, tiny_pipeline, tiny_transformer

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models import family_of


class TestZImage(FamilySuite):
    """Turbo runs without guidance, the base model with it."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided={"guidance_scale": 3.0},
        schedulers={"constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)},
        lora=("to_out.0", "feed_forward.w2"),
        more={"guidance_scale": 0.0},
    )


MASKED = {
    "two": ((7, 40), ()),
    "two guided": ((40, 7), (3, 35)),
    "guided apart": ((40,), (7,)),
    "none padded": ((32, 64), ()),
}


@pytest.mark.parametrize("prompts", MASKED.values(), ids=MASKED)
def test_prompts_of_unequal_padded_lengths_equal_diffusers(prompts: Any) -> None:
    pipeline = tiny_pipeline()
    engine, call = eager(pipeline), TestZImage.case.call(*prompts)
    for more in WAYS:
        assert_equal(*runs(pipeline, engine, call, **more), tolerance=TOLERANCE)


def test_a_captured_run_serves_no_prompts_of_other_lengths(graphs: Any) -> None:
    cpu, device = eager(tiny_pipeline()), captured_by(graphs, tiny_pipeline())
    for lengths in ((4, 7), (5, 7), (7, 40), (40, 7), (7, 7)):
        call = TestZImage.case.call(lengths)
        ours = generated(device, call, patch_policy=MIXED)
        assert torch.equal(ours, generated(cpu, call, patch_policy=MIXED))


def test_blocks_are_read_off_with_a_mask_and_without() -> None:
    transformer = tiny_transformer()
    types = {kind.key: kind for kind in family_of(transformer).block_types(transformer)}
    assert list(types) == [
        "noise_refiner",
        "context_refiner",
        "layers",
        "context_refiner:attn_mask",
        "layers:attn_mask",
    ]
    assert {spec.name: spec.dims for spec in types["layers:attn_mask"].inputs} == {
        "x": ("batch", "image+text", 32),
        "attn_mask": ("batch", "image+text"),
        "freqs_cis": ("batch", "image+text", 8, 2),
        "adaln_input": ("batch", 32),
    }
    assert {spec.name: spec.dims for spec in types["context_refiner"].inputs} == {
        "x": ("batch", "text", 32),
        "freqs_cis": ("batch", "text", 8, 2),
    }


@pytest.mark.parametrize("more", [{"cfg_normalization": True}, {"cfg_truncation": 0.5}])
def test_changes_of_guidance_are_refused_by_name(more: dict[str, Any]) -> None:
    engine = eager(tiny_pipeline())
    with pytest.raises(UnsupportedModelError, match=r"cfg_normalization=.*guidance_interval"):
        engine(**TestZImage.case.call((7,), (7,)), **more)


def test_models_with_an_image_encoder_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Omni"):
        eager(tiny_pipeline(siglip_feat_dim=8))


@pytest.mark.parametrize("embeds", [torch.zeros(1, 7, TEXT_WIDTH), [], [None]])
def test_embeddings_that_are_no_list_of_tensors_are_refused(embeds: Any) -> None:
    with pytest.raises(TypeError, match="prompt_embeds.*tensor .*text tokens, width"):
        eager(tiny_pipeline())(prompt_embeds=embeds, guidance_scale=0.0)
