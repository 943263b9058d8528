"""Mixed steps through the engine: on both executors, with all that steps go with, and refused."""

from __future__ import annotations

from typing import Any

import pytest
import qwen_models
import torch
from driving import assert_equal, keep, trace_of
from emulated_graphs import EmulatedGraphs
from models import (
    eager,
    latents_of,
    noise,
    random_adapters,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
)
from wan_models import wan_conditioning

from ddit_rt import DDiTPolicy, Engine, StaticPolicy
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.loop import CpuExecutor, CudaExecutor

STATIC = StaticPolicy(["p", "4p", "2p", "p", "4p", "2p", "2p", "p"], fine_share=0.25)
COARSE_FIRST = StaticPolicy("2p:0.5,p", fine_share=0.5)
DYNAMIC = DDiTPolicy(tau={"2p": 4.0, "4p": 1.0}, refresh=3, fine_share=0.4)
SHAPES = {"flux": (2, 4, 16, 24), "wan": (1, 4, 3, 8, 16)}


def denoise(engine: Engine, name: str, seed: int = 0, **options: Any) -> torch.Tensor:
    shape = SHAPES[name]
    if name == "flux":
        conditioning = tiny_conditioning(engine.pipeline.transformer, shape[0], seed=seed)
    else:
        conditioning = wan_conditioning(shape[0], guidance_scale=4.0)
    options = {"num_inference_steps": 8, **options}
    return engine.denoise(noise(*shape, seed=seed), **options, **conditioning)


@pytest.mark.parametrize(
    ("name", "policy", "cache"),
    [
        ("flux", STATIC, None),
        ("flux", COARSE_FIRST, None),
        ("flux", DYNAMIC, "static:2"),
        ("wan", STATIC, "static:9"),
        ("wan", DYNAMIC, None),
    ],
)
def test_the_cuda_executor_equals_the_cpu(
    request: pytest.FixtureRequest,
    graphs: EmulatedGraphs,
    name: str,
    policy: Any,
    cache: str | None,
) -> None:
    """Twice: graphs that were captured with one run serve another, whose regions are others."""
    engine: Engine = request.getfixturevalue(name)
    executors = CpuExecutor(), CudaExecutor(graphs)
    finals = []
    for seed in (1, 2):
        for executor in executors:
            engine._loop.executor = executor
            finals.append(denoise(engine, name, seed, patch_policy=policy, step_cache=cache))
        assert torch.equal(finals[-1], finals[-2])
    assert len(graphs.captured) == len(set(graphs.captured))
    engine._loop.executor = CpuExecutor()


def test_shares_are_captured_apart(graphs: EmulatedGraphs, flux: Engine) -> None:
    flux._loop.executor = CudaExecutor(graphs)
    tokens = []
    for share in (0.0, 0.25, 0.5):
        policy = StaticPolicy(STATIC.plan, fine_share=share)
        denoise(flux, "flux", patch_policy=policy)
        tokens.append(dict(zip(STATIC.plan, [row.tokens for row in trace_of(flux)], strict=True)))
    assert len(flux.captures) == 3
    flux._loop.executor = CpuExecutor()
    # 8 x 12 tokens: 24 regions of 2 x 2, of which 6 or 12 run whole; 6 of 4 x 4, 2 or 3 of them.
    assert tokens == [
        {"p": 96, "2p": 24, "4p": 6},
        {"p": 96, "2p": 6 * 4 + 18, "4p": 2 * 16 + 4},
        {"p": 96, "2p": 12 * 4 + 12, "4p": 3 * 16 + 3},
    ]


def test_the_trace_says_what_ran(flux: Engine) -> None:
    denoise(flux, "flux", patch_policy="mixed:0.25:4p:0.25,p")
    trace = trace_of(flux)
    assert trace.patch_sizes() == ["4p"] * 2 + ["p"] * 6
    assert trace.notes == ("25% of the regions stay at p in coarse steps",)


def test_it_runs_within_the_pipeline_and_by_the_pipelines_own_loop(flux: Engine) -> None:
    call: dict[str, Any] = {
        **tiny_embeds(),
        "num_inference_steps": 8,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "patch_policy": STATIC,
    }
    latents = latents_of(flux(**call, generator=seeded()))
    assert latents.isfinite().all()
    fine = latents_of(flux(**{**call, "patch_policy": "fine"}, generator=seeded()))
    assert not torch.allclose(latents, fine, atol=1e-3)
    assert_equal(latents_of(flux(**call, generator=seeded(), callback_on_step_end=keep)), latents)


def test_a_size_that_regions_do_not_divide_is_not_offered(flux: Engine) -> None:
    latents = noise(1, 4, 12, 24)  # 6 x 12 tokens
    conditioning = tiny_conditioning(flux.pipeline.transformer)
    with pytest.raises(ShapeError, match="4p"):
        flux.denoise(latents, num_inference_steps=8, patch_policy=STATIC, **conditioning)
    policy = DDiTPolicy(tau=1e9, fine_share=0.25)
    with pytest.warns(UserWarning, match="4p is not offered to mixed steps at this size"):
        flux.denoise(latents, num_inference_steps=8, patch_policy=policy, **conditioning)
    assert set(trace_of(flux).patch_sizes()) == {"p", "2p"}


def test_it_is_refused_with_an_adapter() -> None:
    pipeline = tiny_pipeline()
    adapted = eager(pipeline, adapter=random_adapters(pipeline))
    with pytest.raises(ValueError, match="leave fine_share out, or compile without the adapter"):
        denoise(adapted, "flux", patch_policy=STATIC)


def test_it_is_refused_of_a_model_that_does_not_tell_its_layers() -> None:
    engine = eager(qwen_models.tiny_pipeline())
    embeds = qwen_models.tiny_embeds((7,), 0)["prompt_embeds"]
    with pytest.raises(UnsupportedModelError, match="fine_share"):
        engine.denoise(
            noise(1, 4, 16, 16),
            num_inference_steps=8,
            patch_policy=STATIC,
            encoder_hidden_states=embeds,
        )
