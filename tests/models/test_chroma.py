"""Chroma against diffusers' own pipeline."""

from __future__ import annotations

import pytest
from chroma_models import tiny_embeds, tiny_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler
from family_suite import FamilyCase, FamilySuite, eager

# Diffusers' own, of its own class, whenever a Chroma transformer is made.
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")


class TestChroma(FamilySuite):
    """Text to image."""

    case = FamilyCase(
        pipeline=tiny_pipeline,
        prompts=tiny_embeds,
        guided={"guidance_scale": 5.0},
        schedulers={
            "constant shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
            "karras": lambda: FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, use_karras_sigmas=True
            ),
        },
        more={"guidance_scale": 1.0},
    )


def test_a_mask_of_booleans_is_refused_before_any_work() -> None:
    engine = eager(tiny_pipeline())
    call = TestChroma.case.call()
    mask = call["prompt_attention_mask"]
    with pytest.raises(TypeError, match=r"`prompt_attention_mask` of torch.bool.*torch.float32"):
        engine(**{**call, "prompt_attention_mask": mask.bool()})
