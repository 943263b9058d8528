from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ddit_rt import DDiTPolicy, Engine, FinePolicy, MagCache, NoCache, StaticPolicy, TeaCache
from ddit_rt.artifact import CalibratedPlan, Calibration, Manifest
from ddit_rt.lab.evaluate.plans import (
    EQUAL_STATIC,
    EQUAL_STEPS,
    NamedPlan,
    baselines,
    chosen_plans,
    main_plan,
    reference_plan,
)
from ddit_rt.policies import PatchPolicy

DEFAULT = DDiTPolicy(tau=0.01)
COSTS = {"p": 10.0, "2p": 4.0, "4p": 2.0}


def calibrated(manifest: Manifest, *kinds: str, front: tuple[str, ...] = ()) -> Manifest:
    """A manifest with presets of these kinds, `quality` first, for 24 steps."""

    def plan(kind: str, index: int) -> CalibratedPlan:
        policies: dict[str, PatchPolicy] = {
            "steps": FinePolicy(),
            "static": StaticPolicy(f"2p:0.{index + 1},p"),
            "dynamic": DDiTPolicy(tau=0.001 * (index + 1)),
        }
        return CalibratedPlan(
            kind=kind,
            label=f"{kind} {index}",
            policy=policies[kind].to_dict(),
            num_inference_steps=24 - index - 1 if kind == "steps" else 24,
            cost=100.0 - index,
            speedup=1.5,
            ssim=0.9,
            psnr=30.0,
        )

    presets = {
        name: plan(kind, index)
        for index, (name, kind) in enumerate(
            zip(("quality", "balanced", "fast"), kinds, strict=True)
        )
    }
    record = Calibration(
        num_inference_steps=24,
        cost_unit="tokens",
        target={"speedup": 2.0},
        presets=presets,
        front=tuple(plan(kind, index + 5) for index, kind in enumerate(front))
        or (plan("steps", 9),),
        evidence={},
    )
    return replace(manifest, calibrations=(record,))


@pytest.fixture
def manifest(engine: Engine) -> Manifest:
    return engine.artifact.manifest


def chosen(manifest: Manifest, *choices: Any, steps: int = 24) -> list[NamedPlan]:
    named = [(str(index), choice) for index, choice in enumerate(choices)]
    return chosen_plans(named, manifest, DEFAULT, steps)


def test_uncalibrated_artifact_gives_its_default_policy(manifest: Manifest) -> None:
    (plan,) = chosen(manifest)
    assert plan.candidate.policy == DEFAULT
    assert plan.title == "default (dynamic)"


def test_calibrated_artifact_gives_its_presets_balanced_first(manifest: Manifest) -> None:
    stored = calibrated(manifest, "dynamic", "dynamic", "static")
    assert [plan.name for plan in chosen(stored, steps=12)] == ["default"]
    plans = chosen(stored)
    assert [plan.name for plan in plans] == ["balanced", "quality", "fast"]
    assert [plan.candidate.kind for plan in plans] == ["dynamic", "dynamic", "static"]
    assert main_plan([reference_plan(24), *plans]).name == "balanced"


def test_presets_without_a_dynamic_plan_get_one_from_the_front(manifest: Manifest) -> None:
    plans = chosen(calibrated(manifest, "steps", "steps", "static", front=("static", "dynamic")))
    assert [plan.name for plan in plans] == ["balanced", "quality", "fast", "dynamic"]
    assert main_plan(plans).name == "dynamic"
    assert plans[-1].candidate.label == "dynamic 6"


def test_presets_and_front_without_a_dynamic_plan_get_the_default(manifest: Manifest) -> None:
    plans = chosen(calibrated(manifest, "steps", "steps", "static"))
    assert plans[-1].name == "default"
    assert plans[-1].candidate.policy == DEFAULT


def test_plans_have_the_step_cache_of_a_call(manifest: Manifest) -> None:
    record = calibrated(manifest, "steps", "dynamic", "static").calibrations[0]
    presets = {
        name: replace(plan, step_cache=TeaCache(0.2).to_dict() if name == "balanced" else None)
        for name, plan in record.presets.items()
    }
    stored = replace(manifest, calibrations=(replace(record, presets=presets),))
    default = MagCache(threshold=0.1)
    named: list[tuple[str, Any]] = [
        ("balanced", "balanced"),
        ("quality", "quality"),
        ("own", DEFAULT),
    ]
    plans = chosen_plans(named, stored, DEFAULT, 24, default)
    caches = [plan.candidate.step_cache for plan in plans]
    assert caches == [TeaCache(0.2), NoCache(), default]
    assert [plan.candidate.kind for plan in plans] == ["combined", "steps", "combined"]
    assert main_plan(plans).name == "balanced"
    assert [NamedPlan.from_dict(plan.to_dict()) for plan in plans] == plans


def test_equal_plans_are_kept_once(manifest: Manifest) -> None:
    plans = chosen(manifest, StaticPolicy("2p:0.4,p"), StaticPolicy("2p:0.4,p"), DEFAULT)
    assert [plan.name for plan in plans] == ["0", "2"]


def test_preset_is_resolved_with_its_steps(manifest: Manifest) -> None:
    (plan,) = chosen(calibrated(manifest, "steps", "steps", "steps"), "balanced")
    assert plan.candidate.num_inference_steps == 22
    assert plan.candidate.kind == "steps"


def test_nothing_to_compare_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="not calibrated at all"):
        chosen(manifest, "balanced")
    with pytest.raises(ValueError, match="only plans that run all 24 steps at p"):
        chosen(manifest, FinePolicy())


def cost_of(plan: NamedPlan) -> float:
    if isinstance(plan.candidate.policy, FinePolicy):
        return COSTS["p"] * plan.candidate.num_inference_steps
    assert isinstance(plan.candidate.policy, StaticPolicy)
    return sum(COSTS[str(size)] for size in plan.candidate.policy.plan)


@pytest.mark.parametrize("cost", [60.0, 131.0, 200.0])
def test_baselines_cost_the_same_within_a_fine_step(manifest: Manifest, cost: float) -> None:
    (main,) = chosen(manifest)
    found, notes = baselines(main, cost, COSTS, 24)
    assert [plan.name for plan in found] == [EQUAL_STEPS, EQUAL_STATIC]
    assert not notes
    for plan in found:
        # To half a fine step up, and at most one step's saving down.
        assert cost - COSTS["p"] < cost_of(plan) <= cost + COSTS["p"] / 2


@pytest.mark.parametrize(("cost", "costs"), [(30.0, COSTS), (100.0, {"p": 10.0})])
def test_static_baseline_that_cannot_be_is_noted(
    manifest: Manifest, cost: float, costs: dict[str, float]
) -> None:
    (main,) = chosen(manifest)
    found, notes = baselines(main, cost, costs, 24)
    assert [plan.name for plan in found] == [EQUAL_STEPS]
    assert notes == ["no static plan of 24 steps is as cheap as default"]


def test_baseline_that_is_the_main_plan_itself_is_noted(manifest: Manifest) -> None:
    (main,) = chosen(calibrated(manifest, "steps", "steps", "steps"), "balanced")
    found, notes = baselines(main, 220.0, COSTS, 24)
    assert [plan.name for plan in found] == [EQUAL_STATIC]
    assert notes == ["0 is itself the run of fewer steps of its cost"]
