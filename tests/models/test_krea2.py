"""Krea 2 against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from driving import assert_equal, keep, runs
from family_suite import TOLERANCE, FamilyCase, FamilySuite, eager
from krea2_models import tiny_embeds, tiny_pipeline, tiny_transformer
from models import noise

import ddit_rt
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models import family_of


def guided(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"guidance_scale": 3.0, **tiny_embeds(lengths, seed=3, prefix="negative_")}


class TestKrea2(FamilySuite):
    """The base model runs with guidance, the distilled one without."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided=guided,
        schedulers={
            "shorter": lambda: FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, max_image_seq_len=4096, max_shift=0.9
            ),
            "constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        },
        lora=("to_out.0", "ff.down"),
        more={"guidance_scale": 0.0},
    )


def test_blocks_take_text_and_image_as_one_and_a_mask_of_both() -> None:
    transformer = tiny_transformer()
    (kind,) = family_of(transformer).block_types(transformer)
    assert {spec.name: spec.dims for spec in kind.inputs} == {
        "hidden_states": ("batch", "image+text", 32),
        "temb": ("batch", 1, 192),
        "image_rotary_emb.0": ("image+text", 16),
        "image_rotary_emb.1": ("image+text", 16),
        "attention_mask": ("batch", 1, 1, "image+text"),
    }
    types = {spec.name: spec.dtype for spec in kind.inputs}
    assert (types["temb"], types["attention_mask"]) == (torch.float32, torch.bool)


@pytest.mark.parametrize("guidance", [(), (5,)], ids=["", "guided"])
def test_a_distilled_model_has_a_shift_of_its_own(guidance: tuple[int, ...]) -> None:
    pipeline = tiny_pipeline(is_distilled=True)
    engine, call = eager(pipeline), TestKrea2.case.call((7,), guidance)
    assert_equal(*runs(pipeline, engine, call), tolerance=TOLERANCE)
    assert_equal(*runs(pipeline, engine, call, callback_on_step_end=keep), tolerance=TOLERANCE)
    base = tiny_pipeline()
    ours, theirs = runs(base, engine, call)
    assert float((ours - theirs).abs().max()) > 1e-3


def test_a_scheduler_without_lengths_gets_the_pipelines_own() -> None:
    family = family_of(tiny_transformer())
    for tokens in (24, 4096, 6400):
        theirs = calculate_shift(tokens, 256, 6400, 0.5, 1.15)
        assert family.mu(UniPCMultistepScheduler(), tokens, 6) == pytest.approx(theirs)


def test_sizes_round_up_as_the_pipelines() -> None:
    pipeline = tiny_pipeline()
    call = TestKrea2.case.call(height=60, width=90)
    ours, theirs = runs(pipeline, eager(pipeline), call)
    assert ours.shape[1] == 4 * 6
    assert_equal(ours, theirs, tolerance=TOLERANCE)


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    pipeline = tiny_pipeline()
    call = TestKrea2.case.call()
    mask = call["prompt_embeds_mask"]
    with pytest.raises(TypeError, match=r"`prompt_embeds_mask` of torch.int64.*torch.bool"):
        eager(pipeline)(**{**call, "prompt_embeds_mask": mask.long()})
    pipeline.register_to_config(patch_size=1)
    with pytest.raises(UnsupportedModelError, match=r"patch_size=1.*at 2 only"):
        eager(pipeline)


def test_a_bare_transformer_denoises_from_its_own_arguments() -> None:
    engine = ddit_rt.compile(tiny_transformer(), backend="eager", progress=False)
    embeds, mask = tiny_embeds().values()
    given = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    final = engine.denoise(
        noise(1, 4, 16, 16),
        num_inference_steps=4,
        patch_policy="2p:0.5,p",
        negative_encoder_hidden_states=embeds * 0.5,
        guidance_scale=torch.tensor(3.0),
        **given,
    )
    assert torch.isfinite(final).all()
    with pytest.raises(ShapeError, match=r"`encoder_hidden_states` has shape.*text tokens, 3, 24"):
        engine.denoise(noise(1, 4, 16, 16), **{**given, "encoder_hidden_states": embeds[..., :5]})
    with pytest.raises(TypeError, match=r"`encoder_attention_mask` of torch.float32; expected"):
        engine.denoise(noise(1, 4, 16, 16), **{**given, "encoder_attention_mask": mask.float()})
    with pytest.raises(ValueError, match="`encoder_attention_mask` is missing"):
        engine.denoise(noise(1, 4, 16, 16), encoder_hidden_states=embeds)
