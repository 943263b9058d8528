"""Z-Image against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import assert_equal, keep, runs
from family_suite import MIXED, TOLERANCE, FamilyCase, FamilySuite, eager, generated
from models import noise
from z_image_models import CHANNELS, TEXT_WIDTH, tiny_embeds, tiny_pipeline, tiny_transformer

import ddit_rt
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.loop import CudaExecutor
from ddit_rt.models import family_of


def guided(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"guidance_scale": 3.0, **tiny_embeds(lengths, seed=3, prefix="negative_")}


class TestZImage(FamilySuite):
    """Turbo runs without guidance, the base model with it."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided=guided,
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
    assert_equal(*runs(pipeline, engine, call), tolerance=TOLERANCE)
    assert_equal(*runs(pipeline, engine, call, callback_on_step_end=keep), tolerance=TOLERANCE)


def test_a_captured_run_serves_no_prompts_of_other_lengths(graphs: Any) -> None:
    cpu, device = eager(tiny_pipeline()), eager(tiny_pipeline())
    device._loop.executor = CudaExecutor(graphs)
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


@pytest.mark.parametrize("steps", [4, 8])
def test_a_coarse_prefix_works_in_few_steps(steps: int) -> None:
    engine = eager(tiny_pipeline())
    call = TestZImage.case.call(num_inference_steps=steps)
    engine(**call, patch_policy="2p:0.25,p")
    trace = engine.last_trace
    assert trace is not None
    assert trace.patch_sizes() == ["2p"] * (steps // 4) + ["p"] * (steps - steps // 4)


def test_a_bare_transformer_denoises_from_its_own_arguments() -> None:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    prompt = torch.stack(tiny_embeds((7, 7))["prompt_embeds"])
    final = engine.denoise(
        noise(2, CHANNELS, 16, 16),
        num_inference_steps=4,
        patch_policy="2p:0.5,p",
        cap_feats=prompt,
        negative_cap_feats=prompt * 0.5,
        guidance_scale=torch.tensor(3.0),
    )
    assert torch.isfinite(final).all()
    with pytest.raises(ValueError, match="`cap_feats` is missing"):
        engine.denoise(noise(1, CHANNELS, 16, 16))
