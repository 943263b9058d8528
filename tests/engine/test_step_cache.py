"""Step caches in the engine: against TeaCache over diffusers, and beside changing sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, UniPCMultistepScheduler
from driving import FINE, pattern, trace_of
from models import (
    eager,
    noise,
    random_adapters,
    seeded,
    tiny_conditioning,
    tiny_embeds,
    tiny_pipeline,
)
from reference_teacache import ReferenceTeaCache
from torch import Tensor

import ddit_rt
from ddit_rt import MagCache, NoCache, StaticPolicy, TeaCache
from ddit_rt.artifact import Manifest
from ddit_rt.planning.outline import outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.policies import step_cache_from_dict
from ddit_rt.solver import SolverTable

FLUX_DEV = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
IDENTITY = (1.0, 0.0)
STEPS = 16


@pytest.fixture(scope="module")
def engine() -> ddit_rt.Engine:
    """An uncompiled one; no run knows of another."""
    return eager(tiny_pipeline())


def call(**changes: Any) -> dict[str, Any]:
    size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    return {**tiny_embeds(), **size, "generator": seeded(), **changes}


@pytest.mark.parametrize(
    ("coefficients", "threshold"),
    [(IDENTITY, 0.15), (IDENTITY, 0.4), (FLUX_DEV, 0.8)],
)
def test_equals_teacache_over_diffusers(
    engine: ddit_rt.Engine, coefficients: tuple[float, ...], threshold: float
) -> None:
    pipeline = tiny_pipeline()
    reference = ReferenceTeaCache(pipeline.transformer, threshold, coefficients, STEPS)
    expected = pipeline(**call()).images
    cache = TeaCache(threshold, coefficients=coefficients)
    actual = engine(**call(), patch_policy=FINE, step_cache=cache).images
    wanted = "".join("c" if computed else "r" for computed in reference.computed)
    assert pattern(trace_of(engine)) == wanted
    assert 2 < wanted.count("r") < STEPS - 2, "both happen"
    # fp32 throughout, as without a cache: latents are of order 4.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_the_trace_says_what_each_step_did(engine: ddit_rt.Engine) -> None:
    cache = TeaCache(0.15, coefficients=IDENTITY)
    engine(**call(), patch_policy=FINE, step_cache=cache)
    trace = trace_of(engine)
    assert trace[0].cache_reason == trace[-1].cache_reason == "computed: forced"
    assert trace[0].accumulated is None
    assert trace.reused == pattern(trace).count("r")
    assert trace.tokens == 64 * (STEPS - trace.reused)
    for record in trace:
        if record.accumulated is not None:
            assert record.reused == (record.accumulated < 0.15)
            kind = "reused: below" if record.reused else "computed: above"
            assert record.cache_reason == f"{kind} threshold"
    assert trace.to_dict()["reused"] == trace.reused
    assert "reused: below threshold" in str(trace)
    assert "step cache: TeaCache 0.15, coefficients passed" in trace.notes


def test_threshold_zero_and_no_cache_equal_the_plain_run(engine: ddit_rt.Engine) -> None:
    plain = engine(**call(), patch_policy=FINE).images
    assert {record.cache_reason for record in trace_of(engine)} == {""}
    for cache in (NoCache(), TeaCache(0.0, coefficients=IDENTITY)):
        assert torch.equal(plain, engine(**call(), patch_policy=FINE, step_cache=cache).images)
        assert trace_of(engine).reused == 0


def test_a_change_of_size_computes(engine: ddit_rt.Engine) -> None:
    plan = ["p", "p", "p", "2p", "2p", "2p", "4p", "p", "p", "2p", "2p", "p"]
    cache = TeaCache(1e9, coefficients=IDENTITY)
    engine(**call(num_inference_steps=12), patch_policy=StaticPolicy(plan), step_cache=cache)
    trace = trace_of(engine)
    assert trace.patch_sizes() == plan
    assert pattern(trace) == "crrcrrccrcrc"
    assert trace[3].cache_reason == trace[6].cache_reason == "computed: changed size"
    assert [record.tokens for record in trace][:7] == [64, 0, 0, 16, 0, 0, 4]


def denoise(engine: ddit_rt.Engine, latents: Tensor, **options: Any) -> Tensor:
    model = engine._compiled.steps.transformer
    conditioning = tiny_conditioning(model, latents.shape[0])
    return engine.denoise(latents, num_inference_steps=STEPS, **conditioning, **options)


def modulated_inputs(engine: ddit_rt.Engine, latents: list[Tensor], seed: int = 1) -> list[Tensor]:
    """TeaCache's m for z_k at the base size, by diffusers' own modules, for a seed's prompt."""
    transformer = engine._compiled.steps.transformer
    pooled = tiny_conditioning(transformer, seed=seed)["pooled_projections"]
    rows = []
    for step, z in enumerate(latents):
        height, width = z.shape[-2:]
        tokens = FluxPipeline._pack_latents(z, 1, z.shape[1], height, width)
        level = torch.tensor([1000.0 * (1 - step / STEPS)])
        temb = transformer.time_text_embed(level, pooled)
        block = transformer.transformer_blocks[0]
        rows.append(block.norm1(transformer.x_embedder(tokens), emb=temb)[0])
    return rows


@pytest.mark.parametrize("plan", ["p", "4p:0.5,p"])
def test_the_signal_is_measured_at_the_base_size_whatever_runs(
    engine: ddit_rt.Engine, plan: str
) -> None:
    start = noise(1, 4, 16, 16)
    seen = [start]
    cache = TeaCache(1e9, coefficients=IDENTITY)
    denoise(
        engine,
        start,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        patch_policy=StaticPolicy(plan),
        step_cache=cache,
        callback=lambda _, latents: seen.append(latents.clone()),
    )
    rows = modulated_inputs(engine, seen[:-1])
    total = 0.0
    for step, record in enumerate(trace_of(engine)):
        if not record.reused:
            total = 0.0
            continue
        before = rows[step - 1]
        total += float((rows[step] - before).abs().mean() / before.abs().mean())
        assert record.accumulated == pytest.approx(total, rel=1e-4)


def test_reused_steps_add_the_latest_residual_of_their_size(engine: ddit_rt.Engine) -> None:
    """A coarse step too: at an unchanged latent and time, reusing equals computing."""
    model = engine._compiled
    for multiple in (1, 2, 4):
        outline = outline_run(
            model,
            Request(
                policy=StaticPolicy([multiple] * 2),
                step_cache=TeaCache(1e9, coefficients=IDENTITY, last=0),
            ),
            shape=(2, 4, 16, 16),
            timesteps=torch.tensor([0.7, 0.6]),
            solver=SolverTable(
                coefficients=torch.tensor([[1.0, 0, 0, -0.1, 0, 0]] * 2, dtype=torch.float64),
                sigmas=(0.7, 0.6, 0.5),
                source="euler",
            ),
        )
        plan = plan_run(model, outline, tiny_conditioning(model.steps.transformer, 2))
        bucket = plan.buckets[0][(1, 2, 4).index(multiple)]
        assert bucket is not None
        latents, step = noise(2, 4, 16, 16), torch.tensor([0])
        computed = bucket.velocity(latents, step)
        reused = bucket.velocity(latents, step, reuse=True)
        # x + (y - x) in place of y: one rounding of hidden states of order 10.
        torch.testing.assert_close(reused, computed, rtol=1e-4, atol=1e-4)
        moved = bucket.velocity(noise(2, 4, 16, 16, seed=9), step, reuse=True)
        assert not torch.allclose(moved, computed, atol=0.1)


def test_a_batch_reuses_no_more_than_either_sample_alone(engine: ddit_rt.Engine) -> None:
    start = torch.cat((noise(1, 4, 16, 16), 3 * noise(1, 4, 16, 16, seed=1)))
    cache = TeaCache(0.15, coefficients=IDENTITY)
    both = tiny_conditioning(engine.pipeline.transformer, 2)

    def first_rows(latents: Tensor, rows: slice) -> list[float | None]:
        conditioning = {name: value[rows] for name, value in both.items()}
        engine.denoise(
            latents[rows], num_inference_steps=STEPS, step_cache=cache, patch_policy=FINE,
            **conditioning,
        )  # fmt: skip
        return [record.accumulated for record in trace_of(engine)]

    alone = [first_rows(start, slice(i, i + 1)) for i in (0, 1)]
    together = first_rows(start, slice(0, 2))
    assert together[1] == pytest.approx(max(rows[1] or 0.0 for rows in alone), rel=1e-4)


def test_both_halves_of_guidance_have_a_sum_and_a_say(engine: ddit_rt.Engine) -> None:
    """The larger one decides, whether they run as one batch or one after the other."""
    start = noise(1, 4, 16, 16)
    negative = tiny_conditioning(engine.pipeline.transformer, seed=2)
    guided: dict[str, Any] = {f"negative_{name}": value for name, value in negative.items()}
    guided["true_cfg_scale"] = torch.tensor(3.0)
    finals, reasons = [], []
    for batched in (False, True):
        engine.batched_guidance = batched
        seen = [start]
        final = denoise(
            engine,
            start,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            patch_policy=StaticPolicy("2p:0.5,p"),
            step_cache=TeaCache(0.3, coefficients=IDENTITY),
            callback=lambda _, latents, seen=seen: seen.append(latents.clone()),
            **guided,
        )
        finals.append(final)
        reasons.append([record.cache_reason for record in trace_of(engine)])
        halves = [modulated_inputs(engine, seen[:2], seed) for seed in (1, 2)]
        changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in halves]
        assert changes[0] != pytest.approx(changes[1], rel=1e-3)
        assert trace_of(engine)[1].accumulated == pytest.approx(max(changes), rel=1e-4)
    assert reasons[0] == reasons[1]
    assert "reused: below threshold" in reasons[0]
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-4)


def test_latents_that_a_callback_replaced_under_a_corrector_are_measured(
    engine: ddit_rt.Engine,
) -> None:
    """UniPC goes on from its own latents; the model, and so the signal, sees the callback's."""
    changes = []
    for factor in (1.0, 1.5):
        denoise(
            engine,
            noise(1, 4, 16, 16),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            patch_policy=FINE,
            step_cache=TeaCache(1e9, coefficients=IDENTITY),
            callback=lambda step, z, factor=factor: z * factor if step == 4 else None,
        )
        changes.append([record.accumulated for record in trace_of(engine)])
    assert changes[0][1:5] == pytest.approx(changes[1][1:5])
    assert changes[1][5] > 1.02 * changes[0][5]


def test_adapters_reuse_too() -> None:
    pipeline = tiny_pipeline()
    engine = eager(pipeline, adapter=random_adapters(pipeline))
    cache = TeaCache(1e9, coefficients=IDENTITY)
    engine(**call(num_inference_steps=6), patch_policy=StaticPolicy("2p"), step_cache=cache)
    assert pattern(trace_of(engine)) == "crrrrc"


def test_a_model_without_a_fit_is_refused_before_anything_runs() -> None:
    engine = eager(tiny_pipeline())
    for cache, kind in ((TeaCache(0.4), "teacache"), (MagCache(), "magcache")):
        with pytest.raises(ValueError, match=f"no {kind} .* for this Flux.*--cache {kind}"):
            engine(**call(), step_cache=cache)
    assert engine.last_trace is None


def test_the_default_is_the_artifacts() -> None:
    cache = TeaCache(0.15, coefficients=IDENTITY)
    engine = eager(tiny_pipeline(), step_cache=cache)
    assert engine.default_step_cache == cache
    engine(**call(), patch_policy=FINE)
    assert trace_of(engine).reused > 0
    engine(**call(), patch_policy=FINE, step_cache=NoCache())
    assert trace_of(engine).reused == 0
    manifest = Manifest.from_json(engine.artifact.manifest.to_json())
    assert manifest.step_cache is not None
    assert step_cache_from_dict(manifest.step_cache) == cache
