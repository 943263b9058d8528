"""Plans with a step cache on a real engine: what they cost, and a calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers import FluxInpaintPipeline
from extras import need
from flux_edit_models import mask, picture
from models import pipeline_of, prompting_pipeline

import ddit_rt
from ddit_rt import Engine, FinePolicy, MagCache, SeaCache, StaticCache, StepCache, TeaCache, ops
from ddit_rt.lab.calibrate import CalibrationConfig, Prompt, calibrate
from ddit_rt.lab.plans.bench import EVEN, NO_FIT, OWN_LEVELS, EngineBench
from ddit_rt.lab.plans.candidates import CACHED, KINDS, Candidate
from ddit_rt.lab.plans.genome import Genome
from ddit_rt.lab.plans.step_caches import computed_steps
from ddit_rt.policies import CacheFit, CacheModel

STEPS = 8
SIZE = {"height": 64, "width": 64}
TEXTS = ("a zebra", "a fox", "a cat", "a vase")
PROMPTS = [Prompt(text=text, seed=seed) for seed, text in enumerate(TEXTS)]
TEACACHE = CacheFit(kind="teacache", values=(1.0, 0.0), source="a test")
MAGCACHE = CacheFit(kind="magcache", values=(1.0, *(0.95,) * (STEPS - 1)), source="a test")


def eager(*fits: CacheFit) -> Engine:
    engine = ddit_rt.compile(
        prompting_pipeline(), **SIZE, patch_sizes=("p", "2p"), backend="eager", progress=False
    )
    for fit in fits:
        engine.artifact = engine.artifact.with_cache_fit(fit)
    return engine


def bench(engine: Engine, unit: str = "tokens") -> EngineBench:
    return EngineBench(
        engine, steps=STEPS, probe=PROMPTS[0], arguments={}, unit=unit, skipping=True
    )


def cached(cache: StepCache, steps: int = STEPS) -> Candidate:
    return Candidate(
        kind=CACHED, label="", policy=FinePolicy(), num_inference_steps=steps, step_cache=cache
    )


def test_caches_are_those_with_a_fit_and_their_dials_go_from_none_to_all() -> None:
    need("torchmetrics")
    made = bench(eager(TEACACHE, MAGCACHE))
    dials = made.tables.dials
    assert [type(dial.cache) for dial in dials] == [TeaCache, MagCache, SeaCache, StaticCache]
    assert not made.tables.notes
    ends = [dial.ends for dial in dials if dial.ends is not None]
    assert all(0 < low < high for low, high in ends)
    tea = ends[0]
    none, most = (made.evaluate(cached(TeaCache(end)), PROMPTS[:1]) for end in tea)
    assert none.cost == STEPS * made.tables.costs["p"]
    assert none.ssim == pytest.approx(1)
    # The first and the last step always compute.
    assert most.cost < 0.5 * STEPS * made.tables.costs["p"]


def test_reused_steps_cost_no_tokens_and_some_time() -> None:
    in_tokens = bench(eager(TEACACHE))
    assert in_tokens.tables.costs == {"p": 64.0, "2p": 16.0}
    expected = {"p": 64.0, "p reused": 0.0, "2p": 16.0, "2p reused": 0.0}
    names = ("TeaCache", "SeaCache", "StaticCache")
    assert in_tokens.tables.cache_costs == dict.fromkeys(names, expected)
    in_ms = bench(eager(MAGCACHE), "ms")
    assert in_ms.tables.cache_costs["MagCache"].keys() == {"p", "p reused", "2p", "2p reused"}
    assert all(cost > 0 for cost in in_ms.tables.cache_costs["MagCache"].values())


def test_cost_of_a_plan_counts_its_reused_steps_as_the_table_has_them() -> None:
    need("torchmetrics")
    engine = eager(MAGCACHE)
    made = bench(engine, "ms")
    table = made.tables.cache_costs["MagCache"]
    measured = made.evaluate(cached(MagCache(threshold=0.2)), PROMPTS[:1])
    assert engine.last_trace is not None
    reused = engine.last_trace.reused
    assert 0 < reused < STEPS
    expected = reused * table["p reused"] + (STEPS - reused) * table["p"]
    assert measured.cost == pytest.approx(expected)


def test_what_a_cache_will_cost_is_known_before_it_runs() -> None:
    """Within two of 24 steps; where nothing hangs on the latents, to the step."""
    need("torchmetrics")
    steps = 24
    engine = eager(TEACACHE, replace(MAGCACHE, values=(1.0, *(0.9,) * 11, *(0.97,) * 12)))
    made = EngineBench(
        engine, steps=steps, probe=PROMPTS[0], arguments={}, unit="tokens", skipping=True
    )
    for dial in made.tables.dials:
        assert dial.tells
        ways = [(), *(((name, own[0]),) for name, own in dial.varied.items())]
        for level, changed, count in (*product((4, 24, 40), ways, (steps,)), (24, (), steps // 2)):
            share = dial.cost_share(level, changed, count)
            ran = made.evaluate(cached(dial.at(level, changed, steps=count), count), PROMPTS[:1])
            off = 0 if isinstance(dial.cache, StaticCache) else 2
            computed = ran.cost / made.tables.costs["p"]
            assert abs(share * count - computed) <= off + 1e-6, (dial.name, level, changed, count)


@pytest.mark.parametrize(
    "cache",
    [
        *(MagCache(threshold, mag_ratios=(1.0, 0.9, 1.1, 0.7)) for threshold in (0.0, 0.2, 0.6)),
        MagCache(3.0, mag_ratios=(1.0, 0.98), max_skip_steps=5, retention_ratio=0.1),
        *(SeaCache(threshold, max_consecutive_cached=3) for threshold in (0.1, 0.5, 9.0)),
        StaticCache(2.5, first=4),
    ],
)
def test_counted_steps_are_those_that_the_native_decision_computes(cache: StepCache) -> None:
    steps = 30
    table = cache.resolve(CacheModel(name="model", steps=steps, fits=(), time_changes=None))
    assert table is not None
    changes = torch.rand(steps, generator=torch.Generator().manual_seed(0)) * 0.3
    counted = computed_steps(table, changes.tolist() if table.coefficients else table.increments)
    increments, coefficients = table.tensors()
    state, memory = torch.zeros(4, dtype=torch.int32), torch.zeros(ops.CACHE_HEADER + 1)
    record = torch.zeros(steps, ops.CACHE_RECORD)
    computed = 0
    for step in range(steps):
        state.copy_(torch.tensor([0, step + 1, 0, 0]))  # still at the base size
        signal = changes[step : step + 1] if table.signalled(step) else torch.zeros(0)
        ops.decide_reuse_(
            signal,
            increments,
            coefficients,
            state,
            memory,
            record,
            step,
            1,
            table.threshold,
            table.limit,
            table.growth,
        )
        computed += int(state[-1]) == 0
    assert counted == computed
    assert 1 <= counted <= steps


def test_search_without_a_fit_or_levels_says_what_it_goes_without() -> None:
    engine = eager()
    tables = bench(engine).tables
    assert tables.places
    assert [dial.name for dial in tables.dials] == ["SeaCache", "StaticCache"]
    assert tables.notes == [NO_FIT]
    config = {**engine.pipeline.scheduler.config, "use_flow_sigmas": True}
    engine.pipeline.scheduler = type(engine.pipeline.scheduler).from_config(config)
    tables = bench(engine).tables
    assert not tables.places
    assert tables.notes == [NO_FIT, OWN_LEVELS]


@pytest.mark.filterwarnings("ignore:driven by the pipeline's own loop")
def test_reuse_is_planned_unless_only_the_pipeline_can_take_the_steps() -> None:
    assert all(
        (dial.drift is not None) == isinstance(dial.cache, StaticCache)
        for dial in bench(eager()).tables.dials
    )
    prompting = prompting_pipeline()
    parts = prompting.components
    inpainting = pipeline_of(
        FluxInpaintPipeline,
        **{
            name: parts[name]
            for name in parts
            if name not in ("image_encoder", "feature_extractor")
        },
    )
    inpainting.encode_prompt = prompting.encode_prompt
    tables = EngineBench(
        ddit_rt.compile(
            inpainting, **SIZE, patch_sizes=("p", "2p"), backend="eager", progress=False
        ),
        steps=STEPS,
        probe=PROMPTS[0],
        arguments={
            **SIZE,
            "image": picture(width=64),
            "mask_image": mask()[..., :64],
            "strength": 1.0,
        },
        unit="tokens",
        skipping=True,
    ).tables
    assert tables.drift is None
    assert EVEN in tables.notes
    static = next(dial for dial in tables.dials if isinstance(dial.cache, StaticCache))
    assert static.at(24, steps=STEPS).plan == pytest.approx((1.1 * 8.0) ** 0.5, rel=1e-3)


def test_what_was_measured_is_read_back_with_the_drift() -> None:
    first = bench(eager(MAGCACHE))
    known = json.loads(json.dumps(first.tables.to_dict()))
    again = EngineBench(
        eager(MAGCACHE),
        steps=STEPS,
        probe=PROMPTS[0],
        arguments={},
        unit="tokens",
        skipping=True,
        known=known,
    )
    assert again.tables.drift == first.tables.drift is not None
    assert again.tables.to_dict() == first.tables.to_dict()


@pytest.mark.slow
def test_calibration_tries_every_kind_and_counts_its_pictures() -> None:
    need("torchmetrics")
    config = CalibrationConfig(
        request={"speedup": 1.5},
        prompts=TEXTS,
        calibration_prompts=2,
        held_out_prompts=2,
        pictures=140,
        cost_unit="tokens",
    )
    made = bench(eager(TEACACHE))
    result = calibrate(made, config, {})
    assert {point.candidate.kind for point in result.points} >= {"fine", *KINDS}
    assert result.calibration.evidence["pictures"]["total"] == made.runs <= 140


def test_plan_with_levels_of_its_own_runs_at_them() -> None:
    need("torchmetrics")
    engine = eager()
    placed = Genome(steps=5, shift=2.0).candidate()
    made = bench(engine).evaluate(placed, PROMPTS[:1])
    assert engine.last_trace is not None
    with_levels = [record.sigma for record in engine.last_trace]
    own = bench(engine).evaluate(Genome(steps=5).candidate(), PROMPTS[:1])
    assert [record.sigma for record in engine.last_trace] != with_levels
    assert made.similarity != own.similarity
