"""Plans with a step cache on a real engine: what they cost, and a whole calibration."""

from __future__ import annotations

from typing import Any

import pytest
from extras import need
from models import prompting_pipeline

import ddit_rt
from ddit_rt import Engine, FinePolicy, MagCache, NoCache, TeaCache
from ddit_rt.lab.calibrate import CalibrationConfig, Prompt, calibrate
from ddit_rt.lab.calibrate.report import summary, write_report
from ddit_rt.lab.plans.bench import NO_FIT, EngineBench
from ddit_rt.lab.plans.candidates import CACHED, Candidate
from ddit_rt.policies import CacheFit

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
        engine, steps=STEPS, probe=PROMPTS[0], arguments={}, unit=unit, repeats=1, skipping=True
    )


def cached(cache: ddit_rt.StepCache, steps: int = STEPS) -> Candidate:
    return Candidate(
        kind=CACHED, label="", policy=FinePolicy(), num_inference_steps=steps, step_cache=cache
    )


def test_caches_are_those_with_a_fit_and_their_dials_go_from_none_to_all() -> None:
    need("torchmetrics")
    made = bench(eager(TEACACHE, MAGCACHE))
    assert [type(entry.cache) for entry in made.caches] == [TeaCache, MagCache]
    assert not made.notes
    for entry in made.caches:
        low, high = entry.thresholds
        assert 0 < low < high
    tea = made.caches[0].thresholds
    none, most = (made.evaluate(cached(TeaCache(end)), PROMPTS[:1]) for end in tea)
    assert none.cost == STEPS * made.costs["p"]
    assert none.ssim == pytest.approx(1)
    # The first and the last step always compute.
    assert most.cost < 0.5 * STEPS * made.costs["p"]


def test_reused_steps_cost_no_tokens_and_some_time() -> None:
    in_tokens = bench(eager(TEACACHE))
    assert in_tokens.costs == {"p": 64.0, "2p": 16.0}
    assert in_tokens.cache_costs == {
        "TeaCache": {"p": 64.0, "p reused": 0.0, "2p": 16.0, "2p reused": 0.0}
    }
    in_ms = bench(eager(MAGCACHE), "ms")
    assert in_ms.cache_costs["MagCache"].keys() == {"p", "p reused", "2p", "2p reused"}
    assert all(cost > 0 for cost in in_ms.cache_costs["MagCache"].values())


def test_cost_of_a_plan_counts_its_reused_steps_as_the_table_has_them() -> None:
    need("torchmetrics")
    engine = eager(MAGCACHE)
    made = bench(engine, "ms")
    table = made.cache_costs["MagCache"]
    measured = made.evaluate(cached(MagCache(threshold=0.2)), PROMPTS[:1])
    assert engine.last_trace is not None
    reused = engine.last_trace.reused
    assert 0 < reused < STEPS
    expected = reused * table["p reused"] + (STEPS - reused) * table["p"]
    assert measured.cost == pytest.approx(expected)


def test_search_without_a_fit_says_what_it_goes_without() -> None:
    made = bench(eager())
    assert not made.caches
    assert not made.cache_costs
    assert made.notes == [NO_FIT]


def test_calibrated_step_cache_is_searched_told_and_run(tmp_path: Any) -> None:
    need("matplotlib", "torchmetrics")
    engine = eager(TEACACHE)
    config = CalibrationConfig(
        request={"speedup": 1.5},
        prompts=TEXTS,
        calibration_prompts=2,
        held_out_prompts=2,
        evaluations=6,
        cost_unit="tokens",
    )
    result = calibrate(bench(engine), config, {})
    kinds = {point.candidate.kind for point in result.points}
    assert kinds >= {"fine", "steps", "static", "cached"}
    plans = [plan for plan in result.calibration.front if plan.step_cache]
    assert plans, "reusing loses little on random weights whose blocks add little"
    assert all("TeaCache" in plan.label for plan in plans)
    write_report(result.calibration, result.points, tmp_path)
    assert (tmp_path / "pareto-8.png").is_file()
    assert '"step_cache": "TeaCache"' in (tmp_path / "calibration-8.json").read_text()
    assert "cached" in summary(result.calibration)
    engine.artifact = engine.artifact.with_calibration(result.calibration)
    speeds = [index / 50 for index in range(51)]
    chosen = next(s for s in speeds if result.calibration.plan(s) == plans[0])
    engine(TEXTS[0], num_inference_steps=STEPS, patch_policy=chosen)
    trace = engine.last_trace
    assert trace is not None
    assert trace.notes[-1].startswith(f"step cache: TeaCache {plans[0].step_cache['threshold']:g}")
    engine(TEXTS[0], num_inference_steps=STEPS, patch_policy=chosen, step_cache=NoCache())
    assert engine.last_trace is not None
    assert engine.last_trace.reused == 0
