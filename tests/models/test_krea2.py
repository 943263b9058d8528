"""Krea 2 against diffusers' own pipeline."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from driving import assert_equal, runs
from family_suite import TOLERANCE, WAYS, FamilyCase, FamilySuite, eager
from krea2_models import tiny_embeds, tiny_pipeline, tiny_transformer

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models import family_of


class TestKrea2(FamilySuite):
    """The base model runs with guidance, the distilled one without."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided={"guidance_scale": 3.0},
        schedulers={
            "shorter": lambda: FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, max_image_seq_len=4096, max_shift=0.9
            ),
            "constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        },
        lora=("to_out.0", "ff.down"),
        more={"guidance_scale": 0.0},
    )


@pytest.mark.parametrize("guidance", [(), (5,)], ids=["", "guided"])
def test_a_distilled_model_has_a_shift_of_its_own(guidance: tuple[int, ...]) -> None:
    pipeline = tiny_pipeline(is_distilled=True)
    engine, call = eager(pipeline), TestKrea2.case.call((7,), guidance)
    for more in WAYS:
        assert_equal(*runs(pipeline, engine, call, **more), tolerance=TOLERANCE)
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
