"""Runs whose latents are not finite: announced and recorded, whatever decides the sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from diffusers import UniPCMultistepScheduler
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
from torch import Tensor
from wan_models import CALL as WAN_CALL
from wan_models import wan_pipeline

import ddit_rt
from ddit_rt import DDiTPolicy, Engine, FinePolicy, StaticPolicy, TeaCache
from ddit_rt.errors import ScheduleError

STEPS = 6
POLICIES = (FinePolicy(), StaticPolicy("2p:0.5,p"), DDiTPolicy(1e-3, fine_tail=0))


def call(engine: Engine, **arguments: Any) -> Tensor:
    fixed = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    result = engine(**{**tiny_embeds(), **fixed, "generator": seeded(), **arguments})
    return result.images


def test_prompt_embeddings_that_are_nan_are_announced() -> None:
    engine, embeds = eager(tiny_pipeline()), tiny_embeds()
    embeds["prompt_embeds"][0, 0, 0] = math.nan
    with pytest.warns(UserWarning, match="became NaN or infinite during the run") as warned:
        call(engine, **embeds, patch_policy=POLICIES[1])
    assert len(warned) == 1
    assert trace_of(engine).nonfinite
    assert trace_of(engine).to_dict()["nonfinite"] is True


@pytest.mark.parametrize(
    ("policy", "bad"), list(zip(POLICIES, (math.nan, math.inf, math.nan), strict=True))
)
def test_weights_that_are_not_finite_are_announced_by_the_bare_loop(
    policy: ddit_rt.PatchPolicy, bad: float
) -> None:
    transformer = tiny_transformer()
    transformer.proj_out.bias[0] = bad
    engine = eager(transformer)
    with pytest.warns(UserWarning, match="became NaN or infinite") as warned:
        engine.denoise(
            noise(1, 4, 16, 16),
            num_inference_steps=STEPS,
            patch_policy=policy,
            **tiny_conditioning(transformer),
        )
    assert [warning.filename for warning in warned] == [__file__]
    assert trace_of(engine).nonfinite


def test_step_is_named_where_scores_noticed_it() -> None:
    engine = eager(tiny_pipeline())

    def spoil(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        return {"latents": tensors["latents"] * (math.nan if step == 2 else 1)}

    # Scores are taken from step 3 on, and see the latents that step 2 left.
    policy = DDiTPolicy(1e-3, fine_tail=0, refresh=None)
    with pytest.warns(UserWarning, match=f"noticed before step 3 of {STEPS}"):
        call(engine, callback_on_step_end=spoil, patch_policy=policy)
    assert trace_of(engine).first_nonfinite == 3
    with pytest.warns(UserWarning, match="noticed in the final latents"):
        call(engine, callback_on_step_end=spoil, patch_policy=FinePolicy())
    assert trace_of(engine).first_nonfinite is None


def test_step_is_named_where_a_signal_noticed_it() -> None:
    engine, embeds = eager(tiny_pipeline()), tiny_embeds()
    embeds["pooled_prompt_embeds"][0, 0] = math.nan
    cache = TeaCache(0.4, coefficients=(1.0, 0.0))
    with pytest.warns(UserWarning, match=f"noticed before step 1 of {STEPS}"):
        call(engine, **embeds, patch_policy=FinePolicy(), step_cache=cache)


def test_last_step_alone_is_enough() -> None:
    engine = eager(tiny_pipeline())

    def spoil(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> Any:
        latents = tensors["latents"].clone()
        latents[0, 0, 0] = math.inf if step == STEPS - 1 else latents[0, 0, 0]
        return {"latents": latents}

    for policy in POLICIES:
        with pytest.warns(UserWarning, match="noticed in the final latents"):
            call(engine, callback_on_step_end=spoil, patch_policy=policy)


@pytest.mark.parametrize(
    ("option", "policy"),
    [({"solver_type": "bh1"}, "fine"), ({"lower_order_final": False}, "dynamic")],
)
def test_schedule_that_ends_in_nan_is_refused_whatever_the_policy(
    option: dict[str, Any], policy: str
) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    engine = eager(wan_pipeline(UniPCMultistepScheduler(**flow, **option)))
    ((name, value),) = option.items()
    reason = f"UniPCMultistepScheduler .*step 5 of 6 gives NaN or infinity with {name}={value!r}"
    with pytest.raises(ScheduleError, match=reason):
        engine(**WAN_CALL, patch_policy=policy)
    assert engine.last_trace is None
