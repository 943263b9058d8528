"""The record of a calibration: presets, front and evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddit_rt.artifact import CalibratedPlan, Calibration
from ddit_rt.lab.calibrate.confirm import Confirmation, HeldOut
from ddit_rt.lab.plans.bench import Bench
from ddit_rt.lab.plans.candidates import Candidate
from ddit_rt.lab.plans.points import Point, best_for, pareto_front
from ddit_rt.lab.plans.target import GENTLE, STRONG, Target
from ddit_rt.policies import NoCache

if TYPE_CHECKING:
    from ddit_rt.lab.calibrate.run import CalibrationConfig


def calibration_record(
    bench: Bench,
    config: CalibrationConfig,
    conditions: Mapping[str, Any],
    decided: Confirmation,
    winner: Point,
    points: Sequence[Point],
    target: Target,
) -> Calibration:
    """What a calibration leaves in the artifact.

    Args:
        bench: Ran the plans.
        config: Settings.
        conditions: What the figures hold for.
        decided: Held-out figures.
        winner: The winner on the calibration prompts.
        points: Every plan that was measured, full resolution first.
        target: The request as a limit.
    """
    base = points[0].cost
    # A plan that looked better than the winner until the held-out prompts is no part of the front.
    standing = [point for point in points if not point.dominates(winner)]
    front = pareto_front(standing, lambda point: point.cost, lambda point: point.ssim)[::-1]
    presets = {
        "quality": _quality(front, winner, target.shifted(GENTLE, base)),
        "balanced": winner,
        "fast": _fast(front, winner, target.shifted(STRONG, base)),
    }
    evidence = {
        "verdict": decided.decision,
        "seed": config.seed,
        "notes": list(bench.notes),
        "makes": bench.measure.makes,
        "measure": {"name": bench.measure.name, "ratio": bench.measure.ratio},
        **_prompts(config),
        **_costs(bench),
        "candidates": [_candidate(point) for point in points],
        **_decision(decided),
        **conditions,
    }
    return Calibration(
        num_inference_steps=bench.steps,
        cost_unit=config.cost_unit,
        target=dict(config.request),
        presets={name: _plan(point, base) for name, point in presets.items()},
        front=tuple(_plan(point, base) for point in front),
        evidence=evidence,
    )


def _prompts(config: CalibrationConfig) -> dict[str, Any]:
    prompts, held_out = config.split()
    return {
        "prompts": [[prompt.text, prompt.seed] for prompt in prompts],
        "held_out_prompts": [[prompt.text, prompt.seed] for prompt in held_out],
    }


def _costs(bench: Bench) -> dict[str, Any]:
    return {
        "step_costs": dict(bench.costs),
        "step_caches": [
            {"cache": type(entry.cache).__name__, "thresholds": list(entry.thresholds)}
            for entry in bench.caches
        ],
        "step_cache_costs": {name: dict(costs) for name, costs in bench.cache_costs.items()},
    }


def _decision(decided: Confirmation) -> dict[str, Any]:
    return {
        "held_out_fine_cost": decided.fine.cost,
        "held_out": _by_kind(decided, decided.candidates),
        "at_equal_cost": {kind: _by_kind(decided, row) for kind, row in decided.baselines.items()},
        "closer_on": {kind: dict(row) for kind, row in decided.shares.items()},
        "static_at_the_winners_cost": decided.static and _held_out(decided, decided.static),
        "winner_is_closer_than_static_on": decided.over_static,
        "winner": decided.winner,
        "met": decided.met,
    }


def _by_kind(decided: Confirmation, plans: Mapping[str, HeldOut]) -> dict[str, Any]:
    return {kind: _held_out(decided, plan) for kind, plan in plans.items()}


def _quality(front: Sequence[Point], winner: Point, gentle: Target) -> Point:
    """The best for the gentler target among those that are no faster than the winner."""
    slower = [point for point in front if point.cost >= winner.cost and point.ssim >= winner.ssim]
    return best_for(gentle, slower) or winner


def _fast(front: Sequence[Point], winner: Point, strong: Target) -> Point:
    """The best for the stronger target, else the fastest, of those no slower than the winner."""
    faster = [point for point in front if point.cost <= winner.cost]
    return best_for(strong, faster) or (faster[-1] if faster else winner)


def _plan(point: Point, base: float) -> CalibratedPlan:
    candidate = point.candidate
    return CalibratedPlan(
        kind=candidate.kind,
        label=candidate.label,
        policy=_plain(candidate.policy.to_dict()),
        num_inference_steps=candidate.num_inference_steps,
        cost=point.cost,
        speedup=base / point.cost,
        ssim=point.ssim,
        psnr=point.measurement.mean_psnr,
        step_cache=_cache(candidate),
    )


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """What JSON gives back, so that a record equals itself after loading."""
    plain = json.loads(json.dumps(data))
    assert isinstance(plain, dict)
    return plain


def _cache(candidate: Candidate) -> dict[str, Any] | None:
    cache = candidate.step_cache
    return None if isinstance(cache, NoCache) else _plain(cache.to_dict())


def _candidate(point: Point) -> dict[str, Any]:
    return {
        "kind": point.candidate.kind,
        "label": point.candidate.label,
        "num_inference_steps": point.candidate.num_inference_steps,
        "step_cache": _cache(point.candidate),
        "cost": point.cost,
        "ssim": point.ssim,
        "psnr": point.measurement.mean_psnr,
    }


def _held_out(decided: Confirmation, plan: HeldOut) -> dict[str, Any]:
    return {
        "label": plan.candidate.label,
        "step_cache": _cache(plan.candidate),
        "cost": plan.result.cost,
        "speedup": decided.speedup(plan),
        "ssim": plan.result.ssim,
        "psnr": plan.result.mean_psnr,
        "ssim_per_prompt": list(plan.result.similarity),
    }
