"""Calibration on an engine whose optimum is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
from synthetic import SyntheticBench

from ddit_rt.artifact import PRESETS, Calibration
from ddit_rt.lab.calibrate import CalibrationConfig, Prompt, calibrate
from ddit_rt.lab.calibrate.run import CalibrationResult
from ddit_rt.lab.plans.candidates import full_resolution
from ddit_rt.policies import TeaCache

PROMPTS = tuple(f"prompt {index}" for index in range(20))


def run(bench: SyntheticBench, request: dict[str, float], **fields: Any) -> CalibrationResult:
    config = CalibrationConfig(
        request=request,
        prompts=PROMPTS,
        calibration_prompts=8,
        held_out_prompts=12,
        **{"cost_unit": "tokens", **fields},
    )
    return calibrate(bench, config, {})


def best_static_loss(bench: SyntheticBench, share: float) -> float:
    """Least loss of any plan that looks at no image and costs `share` of all fine.

    Losses add and grow with the step, so of k steps at 2p and m at 4p the best are the first.
    """
    prompt, steps = Prompt(text="", seed=0), bench.steps
    flat = SyntheticBench(steps=steps, coarse_loss=bench.coarse_loss, spread=0)
    least = float("inf")
    for twos, fours in product(range(steps + 1), repeat=2):
        cost = 10.0 * (steps - twos - fours) + 4.0 * twos + 2.5 * fours
        if twos + fours > steps or cost > 10.0 * steps * share:
            continue
        plan = [2] * fours + [1] * twos
        least = min(least, sum(flat.loss(prompt, k, size, steps) for k, size in enumerate(plan)))
    return least


@pytest.mark.parametrize("speedup", [1.3, 1.6, 2.0])
def test_dynamic_hits_its_speed_and_beats_baselines_where_prompts_differ(
    speedup: float,
) -> None:
    decided = run(SyntheticBench(step_loss=1.0), {"speedup": speedup}).confirmation
    assert decided.winner == "dynamic"
    assert decided.met
    dynamic = decided.candidates["dynamic"]
    # The requirement's own tolerance: the target speed within 10% on held-out prompts.
    assert decided.speedup(dynamic) == pytest.approx(speedup, rel=0.1)
    equals = decided.baselines["dynamic"]
    for name, equal in equals.items():
        assert dynamic.result.ssim > equal.result.ssim
        # A baseline's cost comes in steps: those of one fine step less, at most.
        assert equal.result.cost == pytest.approx(dynamic.result.cost, abs=10)
        assert equal.result.cost <= dynamic.result.cost
        assert 0 <= decided.shares["dynamic"][name] <= 1
    assert set(equals) == {"static", "steps"}
    assert decided.static == equals["static"]
    assert decided.over_static == decided.shares["dynamic"]["static"]
    # Most of the prompts: twice as fast, the best static plan is nearly as good on this formula.
    assert decided.over_static > 0.5


@pytest.mark.parametrize("ssim", [0.9, 0.95])
def test_dynamic_hits_its_similarity(ssim: float) -> None:
    decided = run(SyntheticBench(step_loss=1.0), {"min_ssim": ssim}).confirmation
    assert decided.winner == "dynamic"
    dynamic = decided.candidates["dynamic"].result
    # The requirement's own tolerance, on held-out prompts.
    assert dynamic.ssim == pytest.approx(ssim, abs=0.02)
    assert dynamic.ssim > decided.baselines["dynamic"]["static"].result.ssim


@pytest.mark.parametrize("request_", [{"speedup": 1.8}, {"min_ssim": 0.95}])
def test_fewer_steps_win_where_trajectories_are_straight(request_: dict[str, float]) -> None:
    result = run(SyntheticBench(step_loss=1e-4), request_)
    assert result.confirmation.winner == "steps"
    assert "fewer steps (" in result.confirmation.decision
    decided = result.confirmation
    if "speedup" in request_:  # with so few steps as for the other, no static plan is as cheap
        assert decided.static is not None
        assert decided.static.result.cost <= decided.candidates["steps"].result.cost
        assert decided.over_static == 1  # here a coarse step loses more on every prompt
    balanced = result.calibration.presets["balanced"]
    assert balanced.policy == {"policy": "FinePolicy"}
    assert balanced.num_inference_steps < 24


@pytest.mark.parametrize("request_", [{"speedup": 1.6}, {"min_ssim": 0.95}])
def test_static_wins_where_scores_mislead(request_: dict[str, float]) -> None:
    bench = SyntheticBench(step_loss=1.0, spread=0, blind=True)
    result = run(bench, request_)
    assert result.confirmation.winner == "static"
    assert result.confirmation.over_static is None
    assert result.calibration.presets["balanced"].policy["policy"] == "StaticPolicy"
    if "speedup" in request_:
        found = -math.log(result.confirmation.candidates["static"].result.ssim)
        # 20 evaluations reach the best of all static plans within a quarter of its loss.
        assert found <= 1.25 * best_static_loss(bench, 1 / 1.6)


@pytest.mark.parametrize("step_loss", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.9])
@pytest.mark.parametrize("request_", [{"speedup": 1.6}, {"min_ssim": 0.96}])
def test_winner_is_never_worse_than_a_baseline_at_equal_cost(
    step_loss: float, spread: float, request_: dict[str, float]
) -> None:
    result = run(SyntheticBench(step_loss=step_loss, spread=spread), request_)
    winner = result.calibration.presets["balanced"]
    held_out = result.confirmation
    for point in result.points:
        equal = point.candidate.kind in ("static", "steps") and point.cost <= winner.cost
        # Of the plans measured on the calibration prompts; the held-out prompts may overrule
        # those of the same family by as much as the prompts differ.
        assert not equal or point.ssim <= winner.ssim + 0.01
    best = held_out.candidates[held_out.winner].result
    others = {**held_out.candidates, **held_out.baselines.get(held_out.winner, {})}
    for kind, other in others.items():
        cheaper = other.result.cost <= best.cost
        assert kind == held_out.winner or not cheaper or other.result.ssim <= best.ssim


def test_front_and_presets_are_monotone() -> None:
    calibration = run(SyntheticBench(), {"speedup": 1.6}).calibration
    front = calibration.front
    assert front[0].kind == "fine"
    assert front[0].speedup == 1
    assert all(a.cost > b.cost and a.ssim > b.ssim for a, b in pairwise(front))
    presets = [calibration.presets[name] for name in PRESETS]
    assert all(preset in front for preset in presets)
    costs = [preset.cost for preset in presets]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 3
    speeds = [calibration.plan(index / 10).speedup for index in range(11)]
    assert speeds == sorted(speeds)
    assert calibration.plan(0.0) == front[0]
    assert calibration.plan(1.0) == front[-1]


def test_same_seed_gives_the_same_calibration() -> None:
    first = run(SyntheticBench(), {"speedup": 1.6}).calibration
    assert run(SyntheticBench(), {"speedup": 1.6}).calibration == first
    assert isinstance(first, Calibration)
    assert run(SyntheticBench(), {"speedup": 1.6}, seed=1).calibration != first


@pytest.mark.parametrize("speedup", [2.0, 3.0])
def test_step_cache_wins_where_reuse_loses_little(speedup: float) -> None:
    bench = SyntheticBench(step_loss=1.0, reuse_loss=1e-3)
    result = run(bench, {"speedup": speedup})
    decided = result.confirmation
    assert decided.winner == "cached"
    assert decided.met
    assert "full resolution with a step cache (TeaCache 0." in decided.decision
    winner = decided.candidates["cached"].result
    assert decided.speedup(decided.candidates["cached"]) >= speedup / 1.1
    for equal in decided.baselines["cached"].values():
        assert equal.result.cost <= winner.cost
        assert equal.result.ssim < winner.ssim
    # 20 evaluations reach the best threshold of all within a quarter of its loss.
    (found,) = [p for p in result.points if p.candidate == decided.candidates["cached"].candidate]
    prompts = [
        Prompt(text=text, seed=seed) for text, seed in result.calibration.evidence["prompts"]
    ]
    assert -math.log(found.ssim) <= 1.25 * least_cached_loss(bench, prompts, 240 / speedup)
    balanced = result.calibration.presets["balanced"]
    assert balanced.policy == {"policy": "FinePolicy"}
    assert balanced.step_cache == decided.candidates["cached"].candidate.step_cache.to_dict()
    assert f"TeaCache {balanced.step_cache['threshold']:.3g}" in balanced.label


def least_cached_loss(bench: SyntheticBench, prompts: list[Prompt], cost: float) -> float:
    """Of all 24 steps with TeaCache at a threshold, what costs at most `cost` on the prompts."""
    plans = [
        replace(full_resolution(bench.steps), step_cache=TeaCache(0.005 * index))
        for index in range(250)
    ]
    measured = [bench.evaluate(plan, prompts) for plan in plans]
    return min(-math.log(each.ssim) for each in measured if each.cost <= cost)


@pytest.mark.parametrize("request_", [{"speedup": 2.0}, {"min_ssim": 0.95}])
def test_step_cache_loses_where_reuse_loses_much(request_: dict[str, float]) -> None:
    result = run(SyntheticBench(step_loss=1.0, reuse_loss=5.0), request_)
    assert result.confirmation.winner == "dynamic"
    assert result.calibration.presets["balanced"].step_cache is None
    kinds = {point.candidate.kind for point in result.points}
    assert {"cached", "combined"} <= kinds


def test_both_together_win_where_each_has_cheap_savings() -> None:
    """Losses grow with what is saved one way, so at a high speed half of each loses less."""
    decided = run(SyntheticBench(step_loss=1.0, reuse_loss=0.05), {"speedup": 3.0}).confirmation
    assert decided.winner == "combined"
    best = decided.candidates["combined"]
    assert decided.speedup(best) == pytest.approx(3, rel=0.1)
    for kind in ("cached", "dynamic"):
        assert decided.candidates[kind].result.ssim < best.result.ssim
    assert "a dynamic plan with a step cache (TeaCache 0." in decided.decision


def test_step_cache_is_no_match_for_fewer_steps_where_trajectories_are_straight() -> None:
    result = run(SyntheticBench(step_loss=1e-4, reuse_loss=0.05), {"speedup": 2.0})
    assert result.confirmation.winner == "steps"
    assert "over a static plan, full resolution with a step cache, " in result.confirmation.decision
    assert result.confirmation.static is not None


def test_without_a_fit_the_search_says_so_and_goes_on() -> None:
    result = run(SyntheticBench(step_loss=1.0), {"speedup": 2.0})
    (note,) = result.calibration.evidence["notes"]
    assert "no step cache has a fit for this model; `ddit-rt calibrate" in note
    assert result.calibration.evidence["step_caches"] == []
    assert {point.candidate.kind for point in result.points} == {
        "fine",
        "steps",
        "static",
        "dynamic",
    }


@pytest.mark.parametrize("reuse_loss", [None, 0.05])
def test_every_family_has_the_same_bounded_budget(reuse_loss: float | None) -> None:
    bench = SyntheticBench(reuse_loss=reuse_loss)
    result = run(bench, {"speedup": 1.6}, evaluations=12)
    kinds = [point.candidate.kind for point in result.points]
    families = ["steps", "static", "dynamic"]
    adaptive = 1 if reuse_loss is None else 3
    families += [] if reuse_loss is None else ["cached", "combined"]
    assert set(kinds) == {"fine", *families}
    assert all(kinds.count(kind) <= 12 for kind in families)
    # 8 calibration prompts a candidate; 12 held-out ones for the finalists, for two baselines at
    # the cost of each adaptive one, and for a static plan where fewer steps win, beside p.
    confirmed = (1 + len(families)) + (1 + 2 * adaptive) + 2
    assert len(bench.evaluated) <= len(families) * 12 * 8 + confirmed * 12


def test_held_out_prompts_are_never_searched_on() -> None:
    bench = SyntheticBench()
    result = run(bench, {"speedup": 1.6})
    evidence = result.calibration.evidence
    held_out = {text for text, _ in evidence["held_out_prompts"]}
    searched = {text for text, _ in evidence["prompts"]}
    assert not held_out & searched
    # Held-out prompts come after all others.
    confirming = [text in held_out for text in bench.evaluated]
    assert confirming == sorted(confirming)
    assert set(bench.evaluated[: confirming.index(True)]) == searched


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"speedup": 100.0},
            r"no plan reaches speedup=100; the nearest is .* as fast as full resolution",
        ),
        ({"min_ssim": 0.99999}, r"no plan reaches min_ssim=0.99999; the nearest is .*SSIM"),
        ({"budget_ms": 1.0}, r"no plan reaches budget_ms=1; .* 10\.0 ms per image"),
        ({"budget_ms": 900.0}, "full resolution takes 240 ms here"),
    ],
)
def test_impossible_target_is_refused_with_what_is_reachable(
    request_: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(SyntheticBench(), request_, cost_unit="ms")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"request": {"speedup": 1.0}}, "speedup=1.0; it must lie between 1"),
        ({"request": {"min_ssim": 1.5}}, "min_ssim=1.5"),
        ({"request": {"budget_ms": 5.0}, "cost_unit": "tokens"}, "needs cost ms"),
        ({"request": {}}, "give one of"),
        ({"held_out_prompts": 0}, "all must be at least 1"),
        ({"calibration_prompts": 15}, "got 20 different prompts; 15 to calibrate and 8 held out"),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**{"request": {"speedup": 2.0}, "prompts": PROMPTS, **fields})


def test_without_coarse_sizes_there_are_fewer_steps() -> None:
    result = run(SyntheticBench(offered=(1,)), {"speedup": 2.0})
    assert {point.candidate.kind for point in result.points} == {"fine", "steps"}
    assert result.confirmation.candidates["steps"].candidate.num_inference_steps == 12
    assert result.confirmation.decision == "fewer steps (12) won, as the only candidate"
