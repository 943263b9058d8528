"""Stable Diffusion 3.5 against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from driving import assert_equal, runs
from family_suite import TOLERANCE, FamilyCase, FamilySuite, eager
from sd3_models import tiny_embeds, tiny_pipeline, tiny_transformer

from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models import family_of


class TestStableDiffusion3(FamilySuite):
    """Text to image."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided={"guidance_scale": 7.0},
        schedulers={
            "dynamic shift": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "no shift": lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
        },
        more={"guidance_scale": 1.0},
    )


def test_blocks_of_one_class_with_other_tensors_are_types_of_their_own() -> None:
    transformer = tiny_transformer()
    types = family_of(transformer).block_types(transformer)
    assert [(kind.name, kind.members, kind.outputs) for kind in types] == [
        ("JointTransformerBlock.0", (0, 1), 2),
        ("JointTransformerBlock.2", (2,), 2),
        ("JointTransformerBlock.3", (3,), 1),
    ]
    assert [kind.key for kind in types] == [f"transformer_blocks.{place}" for place in (0, 2, 3)]
    assert {spec.name: spec.dims for spec in types[-1].inputs} == {
        "hidden_states": ("batch", "image", 32),
        "encoder_hidden_states": ("batch", "text", 32),
        "temb": ("batch", 32),
    }


def test_blocks_that_differ_within_their_type_are_refused_by_name() -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer.transformer_blocks[1].attn2.to_q.half()
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1"):
        eager(pipeline)


def test_a_picture_beyond_the_table_of_positions_is_refused() -> None:
    engine = eager(tiny_pipeline())
    with pytest.raises(ShapeError, match="272 x 64 pixels; the model's positions end at 256"):
        engine(**TestStableDiffusion3.case.call(height=272, width=64))


@pytest.mark.parametrize("given", [{"skip_guidance_layers": [1]}, {"mu": 0.5}])
def test_what_the_loop_would_ignore_is_refused(given: dict[str, Any]) -> None:
    engine = eager(tiny_pipeline())
    with pytest.raises(UnsupportedModelError, match=f"got `{next(iter(given))}`"):
        engine(**TestStableDiffusion3.case.call(**given))


def test_a_callbacks_own_call_of_the_transformer_runs_the_model() -> None:
    pipeline = tiny_pipeline()
    embeds, pooled = tiny_embeds(seed=4).values()

    def call_it(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        output = pipe.transformer(
            hidden_states=tensors["latents"],
            timestep=timestep[None],
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        return {"latents": tensors["latents"] + 0.1 * output} if step in (1, 2) else tensors

    call = TestStableDiffusion3.case.call((7,), (7,))
    engine = eager(pipeline)
    assert_equal(*runs(pipeline, engine, call, callback_on_step_end=call_it), tolerance=TOLERANCE)
