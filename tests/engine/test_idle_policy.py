"""What was asked for and did nothing is told: once aloud, and in every run's trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import trace_of
from models import (
    eager,
    noise,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
    tiny_transformer,
)

import ddit_rt
from ddit_rt import DDiTPolicy, FinePolicy, MagCache, SeaCache, StaticCache, StaticPolicy

pytestmark = pytest.mark.filterwarnings("error")  # what pyproject.toml lets pass, too

SAYS = "the policy took no coarse step"
CACHE_SAYS = "the step cache reused no step"


def notes_of(engine: ddit_rt.Engine, says: str = SAYS) -> list[str]:
    return [note for note in trace_of(engine).notes if says in note]


def call(engine: ddit_rt.Engine, policy: Any, steps: int = 8, **more: Any) -> None:
    size = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent"}
    engine(**tiny_embeds(), **size, generator=seeded(), patch_policy=policy, **more)


@pytest.mark.parametrize("callback", [None, lambda *_: {}])
def test_it_names_the_nearest_score_once_aloud_and_always_in_the_trace(callback: Any) -> None:
    engine = eager(tiny_pipeline())
    with pytest.warns(UserWarning, match=SAYS) as said:
        call(engine, DDiTPolicy(1e-9), callback_on_step_end=callback)
    assert [warning.filename for warning in said] == [__file__]
    call(engine, DDiTPolicy(1e-9), callback_on_step_end=callback)
    assert "against" in notes_of(engine)[0]
    call(engine, DDiTPolicy(1e9))
    assert not notes_of(engine)


def test_it_names_too_few_steps_in_the_bare_loop_too() -> None:
    transformer = tiny_transformer()
    engine = eager(transformer)
    with pytest.warns(UserWarning, match="none of the 3 steps"):
        engine.denoise(noise(1, 4, 16, 16), num_inference_steps=3, **tiny_conditioning(transformer))
    assert notes_of(engine)


@pytest.mark.parametrize("policy", ["2p:0.01,p", "2p:0,p", "mixed:0.25:2p:0.01,p"])
def test_a_plan_whose_coarse_share_is_less_than_a_step_is_told(policy: str) -> None:
    engine = eager(tiny_pipeline())
    with pytest.warns(UserWarning, match=rf"{SAYS}: none of the 8 .* \(8 static plan\)"):
        call(engine, policy)
    call(engine, policy)
    assert notes_of(engine)
    call(engine, "2p:0.5,p")
    assert not notes_of(engine)


@pytest.mark.parametrize(
    ("cache", "why", "callback"),
    [
        (SeaCache(1e-9), "2 forced, 6 above threshold.*; the least change was 0", None),
        (SeaCache(1e-9), "2 forced, 6 above threshold.*; the least change was 0", lambda *_: {}),
        (MagCache(0.1, mag_ratios=(1.0,) * 8, retention_ratio=1.0), "8 forced", None),
        (StaticCache(1.0), "8 forced", lambda *_: {}),
    ],
)
def test_a_step_cache_that_reused_nothing_is_told(cache: Any, why: str, callback: Any) -> None:
    engine = eager(tiny_pipeline())
    more = {"callback_on_step_end": callback}
    with pytest.warns(UserWarning, match=rf"{CACHE_SAYS}: all 8 steps computed \({why}"):
        call(engine, "fine", step_cache=cache, **more)
    call(engine, "fine", step_cache=cache, **more)
    assert notes_of(engine, CACHE_SAYS)
    call(engine, "fine", step_cache=StaticCache(3.0), **more)
    assert not notes_of(engine, CACHE_SAYS)


def test_a_run_that_ends_early_is_not_judged() -> None:
    pipeline = tiny_pipeline()
    engine = eager(pipeline)

    def stop(_: Any, step: int, *__: Any) -> dict[str, Any]:
        pipeline._interrupt = step == 1
        return {}

    call(engine, "p:0.5,2p:0.25,p", step_cache=SeaCache(1e-9), callback_on_step_end=stop)
    assert len(trace_of(engine)) == 2
    assert not notes_of(engine) + notes_of(engine, CACHE_SAYS)


def test_what_was_told_to_do_nothing_says_nothing() -> None:
    engine = eager(tiny_pipeline())
    for policy in (FinePolicy(), StaticPolicy("p"), DDiTPolicy(0.0)):
        call(engine, policy)
        assert not notes_of(engine)
    for cache in (None, "none", SeaCache(0.0)):
        call(engine, "fine", step_cache=cache)
        assert not notes_of(engine, CACHE_SAYS)


@pytest.mark.parametrize("steps", [4, 5, 6, 8])
def test_the_default_takes_coarse_steps_of_a_smooth_latent(steps: int) -> None:
    """A model that adds nothing: its latents move on a straight line, as smooth as can be."""
    transformer = tiny_transformer()
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    engine = eager(transformer)
    conditioning = tiny_conditioning(transformer)
    engine.denoise(noise(1, 4, 16, 16), num_inference_steps=steps, **conditioning)
    assert set(trace_of(engine).patch_sizes()) > {"p"}
