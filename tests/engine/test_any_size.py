"""Latents that patches do not divide: every patch size, on both executors."""

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
from torch import Tensor
from wan_models import wan_conditioning

from ddit_rt import DDiTPolicy, Engine, StaticPolicy
from ddit_rt.errors import ShapeError
from ddit_rt.loop import CpuExecutor, CudaExecutor

STATIC = StaticPolicy(["4p", "2p", "p", "4p", "2p", "4p", "2p", "p"])
DYNAMIC = DDiTPolicy(tau={"2p": 4.0, "4p": 1.0}, warmup="coarse", refresh=3)

# Latents of FLUX at 768 x 1360 and of Wan at 480 x 832 pixels; smaller ones that leave the same
# rest as 1080 x 1920 and 720 x 1280; with fewer pixels than a patch of 4p, and one token high.
FLUX_LATENTS = [(1, 4, 96, 170), (1, 4, 38, 48), (2, 4, 18, 22), (1, 4, 6, 30), (1, 4, 2, 58)]
WAN_LATENTS = [(1, 4, 2, 60, 104), (1, 4, 1, 18, 32), (1, 4, 3, 6, 14)]


@pytest.fixture(scope="module")
def adapted() -> Engine:
    pipeline = tiny_pipeline()
    return eager(pipeline, adapter=random_adapters(pipeline))


@pytest.fixture(scope="module")
def qwen() -> Engine:
    """A model whose own forward runs the steps."""
    return eager(qwen_models.tiny_pipeline())


@pytest.mark.parametrize(
    ("name", "pixels", "latents"),
    [
        ("flux", (768, 1360), (96, 170)),
        ("flux", (1080, 1920), (134, 240)),  # rounded down to whole tokens
        ("flux", (752, 1392), (94, 174)),
        ("wan", (480, 832, 81), (21, 60, 104)),
        ("wan", (624, 624, 81), (21, 78, 78)),
        ("wan", (720, 1280, 33), (9, 90, 160)),
    ],
)
def test_sizes_that_patches_do_not_divide_offer_all(
    request: pytest.FixtureRequest, name: str, pixels: tuple[int, ...], latents: tuple[int, ...]
) -> None:
    engine: Engine = request.getfixturevalue(name)
    pipeline = tiny_pipeline() if name == "flux" else engine.pipeline
    if name == "flux":
        pipeline.vae_scale_factor = 8  # FLUX's own
    height, width, *frames = pixels
    shape = engine._compiled.steps.family.latent_shape(pipeline, height, width, 1, *frames)
    assert shape[2:] == latents
    *frames, height, width = latents
    assert engine._compiled.offered(height, width, *frames) == ((1, 2, 4), ())


def test_only_sizes_that_the_model_does_not_take_are_refused(flux: Engine) -> None:
    with pytest.raises(ShapeError, match="patches of 2 latent pixels do not divide 17 x 16"):
        flux._compiled.offered(17, 16)
    with pytest.raises(ShapeError, match="2 image tokens are outside the compiled range 4 to"):
        flux._compiled.offered(2, 4)


def run(
    engine: Engine, executor: Any, shape: tuple[int, ...], policy: Any, seed: int
) -> tuple[Tensor, list[tuple[Any, ...]], list[dict[str, float]]]:
    """Latents, what was decided, and scores."""
    kind = type(engine.pipeline).__name__
    if kind == "WanPipeline":
        conditioning = wan_conditioning(shape[0])
    elif kind == "QwenImagePipeline":
        embeds = qwen_models.tiny_embeds((7,) * shape[0], seed)["prompt_embeds"]
        conditioning = {"encoder_hidden_states": embeds}
    else:
        conditioning = tiny_conditioning(engine.pipeline.transformer, shape[0], seed=seed)
    engine._loop.executor = executor
    final = engine.denoise(
        noise(*shape, seed=seed), num_inference_steps=8, patch_policy=policy, **conditioning
    )
    trace = trace_of(engine)
    rows = [(row.patch_size, row.reason, row.tokens) for row in trace]
    return final, rows, [row.scores for row in trace]


CASES = [  # scores are of latents alone, whatever the model
    *[("flux", shape, policy) for shape in FLUX_LATENTS[1:] for policy in (STATIC, DYNAMIC)],
    *[("adapted", shape, STATIC) for shape in FLUX_LATENTS[2:]],
    ("wan", WAN_LATENTS[1], STATIC),
    ("wan", WAN_LATENTS[2], DYNAMIC),
    *[("qwen", shape, STATIC) for shape in FLUX_LATENTS[2:]],
    # The larger ones, and 720 x 1280 pixels themselves.
    *[
        pytest.param(name, shape, policy, marks=pytest.mark.slow)
        for name, shape, policy in (
            ("flux", FLUX_LATENTS[0], DYNAMIC),
            ("adapted", FLUX_LATENTS[0], STATIC),
            ("wan", WAN_LATENTS[0], DYNAMIC),
            ("wan", (1, 4, 1, 90, 160), DYNAMIC),
        )
    ],
]


@pytest.mark.parametrize(("name", "shape", "policy"), CASES)
def test_the_cuda_executor_equals_the_cpu(
    graphs: EmulatedGraphs,
    request: pytest.FixtureRequest,
    name: str,
    shape: tuple[int, ...],
    policy: Any,
) -> None:
    """Twice: graphs that were captured with one run serve another."""
    engine: Engine = request.getfixturevalue(name)
    executors = CpuExecutor(), CudaExecutor(graphs)
    for seed in (1, 2):
        expected, actual = (run(engine, each, shape, policy, seed) for each in executors)
        assert torch.equal(actual[0], expected[0])
        assert actual[1] == expected[1]
        for ours, theirs in zip(actual[2], expected[2], strict=True):
            assert ours == pytest.approx(theirs, rel=5e-6, nan_ok=True)
    assert len(graphs.captured) == len(set(graphs.captured))
    assert expected[0].isfinite().all()
    assert len({patch for patch, _, _ in expected[1]}) > 1


@pytest.mark.parametrize("name", ["flux", "adapted", "wan", "qwen"])
def test_tokens_are_those_of_patches_rounded_up(request: pytest.FixtureRequest, name: str) -> None:
    engine: Engine = request.getfixturevalue(name)
    shape = (1, 4, 2, 18, 26) if name == "wan" else (1, 4, 18, 26)
    _, rows, _ = run(engine, CpuExecutor(), shape, STATIC, seed=1)
    frames = 2 if name == "wan" else 1
    tokens = {"p": 9 * 13 * frames, "2p": 5 * 7 * frames, "4p": 3 * 4 * frames}
    assert [row[2] for row in rows] == [tokens[patch] for patch, _, _ in rows]


@pytest.mark.parametrize("height", [72, 68])
def test_a_pipeline_call_of_such_a_size_makes_its_picture(flux: Engine, height: int) -> None:
    """Through loop and VAE, whoever drives; 68 pixels are rounded down, as diffusers does."""
    flux._loop.executor = CpuExecutor()
    call = {**tiny_embeds(), "num_inference_steps": 8, "height": height, "width": 88}
    call["patch_policy"] = STATIC
    assert flux(**call).images[0].size == (88, height // 8 * 8)
    call["output_type"] = "latent"
    latents = latents_of(flux(**call, generator=seeded()))
    driven = latents_of(flux(**call, generator=seeded(), callback_on_step_end=keep))
    assert latents.isfinite().all()
    assert_equal(driven, latents)
