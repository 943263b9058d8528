"""Prompt and negative prompt of unequal lengths, in FLUX and Wan, beside diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from driving import FINE, assert_equal, keep, latents_of, runs, trace_of
from emulated_graphs import EmulatedGraphs
from models import eager, noise, seeded, tiny_embeds, tiny_pipeline
from wan_models import CALL, TEXT_WIDTH, wan_pipeline

from ddit_rt import StaticPolicy, TeaCache
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.loop import CudaExecutor

APART = "the passes of guidance run one after the other: their prompts are not of one shape"
TOLERANCE = 1e-5
"""Of the latents' scale, in float32; guidance multiplies what rounds differently."""

MIXED = StaticPolicy(["p", "2p", "2p", "p", "2p", "p"])
FLUX = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}


def flux_texts() -> tuple[Any, dict[str, Any]]:
    """By an encoder that takes as many tokens as a text has letters.

    Embeddings of unequal lengths diffusers' own pipeline refuses.
    """
    pipeline = tiny_pipeline()

    def encode_prompt(prompt: str, **_: Any) -> tuple[Any, ...]:
        embeds, pooled = tiny_embeds(text_tokens=len(prompt)).values()
        return embeds, pooled, torch.zeros(len(prompt), 3)

    pipeline.encode_prompt = encode_prompt
    return pipeline, {
        **FLUX,
        "prompt": "a red fox",
        "negative_prompt": "rain",
        "true_cfg_scale": 3.0,
    }


def wan_embeds() -> tuple[Any, dict[str, Any]]:
    embeds = {"prompt_embeds": noise(1, 12, TEXT_WIDTH, seed=1)}
    embeds["negative_prompt_embeds"] = noise(1, 7, TEXT_WIDTH, seed=2)
    return wan_pipeline(), {**CALL, **embeds, "prompt": None}


def wan_texts() -> tuple[Any, dict[str, Any]]:
    pipeline = wan_pipeline()

    def encode_prompt(prompt: str, negative_prompt: str, **_: Any) -> tuple[Any, Any]:
        prompt_embeds, negative = (
            noise(1, len(text), TEXT_WIDTH, seed=len(text)) for text in (prompt, negative_prompt)
        )
        return prompt_embeds, negative

    pipeline.encode_prompt = encode_prompt
    return pipeline, {**CALL, "negative_prompt": "rain and snow"}


every = pytest.mark.parametrize("make", [flux_texts, wan_embeds, wan_texts])
Make = Callable[[], tuple[Any, dict[str, Any]]]


@every
def test_the_passes_run_apart_and_equal_diffusers(make: Make) -> None:
    pipeline, call = make()
    engine = eager(pipeline)
    assert engine.batched_guidance
    assert_equal(*runs(pipeline, engine, call), tolerance=TOLERANCE)
    assert APART in trace_of(engine).notes
    # The same as when both are asked for one by one, in coarse steps too.
    apart = latents_of(engine(**call, patch_policy=MIXED, generator=seeded()))
    engine.batched_guidance = False
    again = latents_of(engine(**call, patch_policy=MIXED, generator=seeded()))
    assert APART not in trace_of(engine).notes
    assert torch.equal(apart, again)


@every
def test_the_pipelines_own_loop_equals_diffusers(make: Make) -> None:
    """Its first step knows how long the negative prompt is, whoever encoded it."""
    pipeline, call = make()
    engine = eager(pipeline)
    assert_equal(*runs(pipeline, engine, call, callback_on_step_end=keep), tolerance=TOLERANCE)
    final = engine(**call, patch_policy=MIXED, generator=seeded(), callback_on_step_end=keep)
    assert torch.isfinite(latents_of(final)).all()


@pytest.mark.parametrize("make", [flux_texts, wan_embeds])
def test_captured_steps_equal_the_cpus(make: Make, graphs: EmulatedGraphs) -> None:
    pipeline, call = make()
    engine = eager(pipeline)
    call |= {"patch_policy": MIXED, "step_cache": TeaCache(9.0, coefficients=(1.0, 0.0))}
    expected = latents_of(engine(**call, generator=seeded()))
    engine._loop.executor = CudaExecutor(graphs)
    assert torch.equal(latents_of(engine(**call, generator=seeded())), expected)


def test_a_length_that_nothing_tells_is_said() -> None:
    pipeline, call = flux_texts()
    own = pipeline.encode_prompt
    pipeline.encode_prompt = lambda **given: list(own(**given))
    with pytest.raises(UnsupportedModelError, match=r"gave 0 text embeddings .*for 2 passes"):
        eager(pipeline)(**call, callback_on_step_end=keep, patch_policy=FINE)
