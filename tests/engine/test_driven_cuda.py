"""Runs that other loops drive on the CUDA executor, which a mock runtime runs on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from driving import CALLBACKS, FINE, assert_equal, keep, latents_of, runs, trace_of
from emulated_graphs import EmulatedGraphs
from models import eager, noise, seeded, tiny_conditioning, tiny_embeds, tiny_pipeline
from wan_models import CALL as WAN
from wan_models import heun, unipc, wan_pipeline

from ddit_rt import DDiTPolicy, Engine, MagCache, SeaCache, StaticCache, StaticPolicy, TeaCache
from ddit_rt.loop import CpuExecutor, CudaExecutor

FLUX = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "latent"}
NEGATIVE = {f"negative_{name}": tensor for name, tensor in tiny_embeds(seed=9).items()}
GUIDED = {**FLUX, **tiny_embeds(), **NEGATIVE, "true_cfg_scale": 3.0}
MIXED = StaticPolicy(["p", "2p", "4p", "p", "2p", "2p"])


def on_device(engine: Engine, graphs: EmulatedGraphs) -> Engine:
    engine._loop.executor = CudaExecutor(graphs)
    return engine


@pytest.mark.parametrize(
    "callback",
    ["in-place latents", "other latents", "in-place prompt", "other prompt", "interrupt"],
)
def test_callbacks_do_what_they_do_in_diffusers(graphs: EmulatedGraphs, callback: str) -> None:
    """What a callback can change or end; who calls it is the same on a CPU."""
    pipeline = wan_pipeline(unipc(), boundary_ratio=0.8)
    engine = on_device(eager(pipeline), graphs)
    assert_equal(*runs(pipeline, engine, {**WAN, "guidance_scale_2": 2.0}, **CALLBACKS[callback]))
    assert trace_of(engine).executor == "pipeline-cuda"
    assert set(graphs.captured) == {
        *("p", "p negative prompt", "p expert 2", "p expert 2, negative prompt")
    }


def test_two_model_calls_a_level_equal_diffusers(graphs: EmulatedGraphs) -> None:
    pipeline = wan_pipeline(heun())
    engine = on_device(eager(pipeline), graphs)
    assert_equal(*runs(pipeline, engine, WAN, **CALLBACKS["in-place latents"]))


@pytest.mark.parametrize(
    "choices",
    [
        {"patch_policy": MIXED},
        {"patch_policy": DDiTPolicy(tau=1.0, fine_tail=1)},
        {"patch_policy": FINE, "step_cache": TeaCache(0.5, coefficients=(1.0, 0.0))},
        {"patch_policy": FINE, "step_cache": SeaCache(9.0, retention_steps=2)},
        {"patch_policy": MIXED, "guidance_interval": (0.34, 0.67)},
        {"step_cache": StaticCache(2, first=1), "guidance_interval": (0.34, 1.0)},
    ],
    ids=["static", "ddit", "cache", "sea", "interval", "static cache"],
)
def test_equals_the_same_run_on_the_cpu(graphs: EmulatedGraphs, choices: dict[str, Any]) -> None:
    """Twice with prompts of their own: graphs that are captured know nothing of another run."""
    engine = on_device(eager(tiny_pipeline()), graphs)
    results: dict[str, list[Any]] = {"cpu": [], "cuda": []}
    executors = {"cuda": engine._loop.executor, "cpu": CpuExecutor()}
    captured = []
    for name, executor in executors.items():
        engine._loop.executor = executor
        for seed in (1, 2):
            call = {**GUIDED, **tiny_embeds(seed=seed), **choices}
            final = engine(**call, generator=seeded(seed), callback_on_step_end=keep)
            rows = [(r.patch_size, r.reason, r.cache_reason) for r in trace_of(engine)]
            results[name].append((latents_of(final), rows))
            captured.append(list(graphs.captured))
    assert captured[0] == captured[-1] != []
    for (ours, rows), (theirs, expected) in zip(results["cuda"], results["cpu"], strict=True):
        assert rows == expected
        assert torch.equal(ours, theirs)


def test_a_run_without_guidance_shares_the_graphs_of_the_table_driven_one(
    graphs: EmulatedGraphs,
) -> None:
    pipeline = tiny_pipeline()
    engine = on_device(eager(pipeline), graphs)
    call = {**FLUX, **tiny_embeds(), "patch_policy": MIXED}
    table = latents_of(engine(**call, generator=seeded()))
    captured = list(graphs.captured)
    driven = latents_of(engine(**call, generator=seeded(), callback_on_step_end=keep))
    assert graphs.captured == captured
    assert_equal(driven, table)
    again = latents_of(engine(**call, generator=seeded()))
    assert torch.equal(again, table)
    assert trace_of(engine).executor == "cuda-loop"


def test_a_step_cache_of_wan_equals_the_cpu(graphs: EmulatedGraphs) -> None:
    cache = MagCache(threshold=0.2, mag_ratios=(1.0, *(0.97,) * 5), retention_ratio=0.1)
    call = {**WAN, "patch_policy": FINE, "step_cache": cache, "callback_on_step_end": keep}
    pipeline = wan_pipeline()
    engines = [eager(pipeline), on_device(eager(pipeline), graphs)]
    finals = [latents_of(engine(**call, generator=seeded())) for engine in engines]
    assert torch.equal(*finals)
    assert trace_of(engines[1]).reused == trace_of(engines[0]).reused > 0


@pytest.mark.parametrize(
    ("policy", "callback"),
    [
        ("fine", {"callback_on_step_end": keep}),
        (MIXED, {}),
        (DDiTPolicy(0.3), {}),
        (DDiTPolicy(0.3), {"callback_on_step_end": keep}),
    ],
)
def test_latents_that_are_not_finite_are_announced(
    graphs: EmulatedGraphs, policy: Any, callback: dict[str, Any]
) -> None:
    engine = on_device(eager(tiny_pipeline()), graphs)
    call = {**FLUX, **tiny_embeds()}
    call["prompt_embeds"][0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="became NaN or infinite during the run") as warned:
        engine(**call, **callback, patch_policy=policy)
    told = [str(one.message) for one in warned]
    assert sum("became NaN" in message for message in told) == 1
    assert trace_of(engine).nonfinite
    engine(**{**call, **tiny_embeds()}, **callback, patch_policy=policy)
    assert not trace_of(engine).nonfinite


@pytest.mark.parametrize("change", ["in place", "returned"])
def test_a_callback_of_denoise_has_the_scheduler_step(graphs: EmulatedGraphs, change: str) -> None:
    """Scores after a change are those of the changed latents, on either executor."""

    def callback(step: int, latents: torch.Tensor) -> torch.Tensor | None:
        if step != 3:
            return None
        return latents.mul_(0.5) if change == "in place" else latents * 0.5

    engine = eager(tiny_pipeline())
    conditioning = tiny_conditioning(engine.pipeline.transformer)
    finals, traces = [], []
    for executor in (CpuExecutor(), CudaExecutor(graphs)):
        engine._loop.executor = executor
        final = engine.denoise(
            noise(1, 4, 16, 16),
            num_inference_steps=8,
            patch_policy=DDiTPolicy(tau=0.5, fine_tail=1),
            callback=callback,
            **conditioning,
        )
        finals.append(final)
        traces.append(trace_of(engine))
    assert [trace.executor for trace in traces] == ["scheduler-cpu", "scheduler-cuda"]
    assert torch.equal(*finals)
    for ours, theirs in zip(*traces, strict=True):
        assert ours.patch_size == theirs.patch_size
        assert ours.scores == pytest.approx(theirs.scores, rel=5e-6)
