"""The record of a calibration: presets, front and evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddit_rt.artifact import CalibratedPlan, Calibration
from ddit_rt.lab.calibrate.confirm import Confirmation
from ddit_rt.lab.plans.bench import Tables
from ddit_rt.lab.plans.points import Point, best_for, pareto_front
from ddit_rt.lab.plans.target import GENTLE, STRONG, Target

if TYPE_CHECKING:
    from ddit_rt.lab.calibrate.run import CalibrationConfig


def calibration_record(
    tables: Tables,
    config: CalibrationConfig,
    conditions: Mapping[str, Any],
    decided: Confirmation,
    winner: Point,
    points: Sequence[Point],
    target: Target,
) -> Calibration:
    """What a calibration leaves in the artifact.

    Args:
        tables: What the bench knew.
        config: Settings.
        conditions: What the figures hold for, and what it took.
        decided: Held-out figures.
        winner: The winner on the calibration prompts.
        points: Every plan that was measured on all of them, full resolution first.
        target: The request as a limit.
    """
    base = points[0].cost
    # A plan that looked better than the winner until the held-out prompts is no part of the front.
    standing = [point for point in points if not point.dominates(winner)]
    front = pareto_front(standing, lambda point: point.cost, lambda point: point.ssim)[::-1]
    slower = [point for point in front if point.cost >= winner.cost and point.ssim >= winner.ssim]
    faster = [point for point in front if point.cost <= winner.cost]
    presets = {
        "quality": best_for(target.shifted(GENTLE, base), slower) or winner,
        "balanced": winner,
        # Where none meets the stronger target, the fastest.
        "fast": best_for(target.shifted(STRONG, base), faster) or [winner, *faster][-1],
    }
    # Far beyond the strongest target nothing was looked for.
    front = [point for point in front if point.cost >= presets["fast"].cost / 2]
    prompts, held_out = config.split()
    evidence = {
        "verdict": decided.decision,
        "seed": config.seed,
        "notes": list(tables.notes),
        "makes": tables.measure.makes,
        "measure": {"name": tables.measure.name, "ratio": tables.measure.ratio},
        "prompts": [[prompt.text, prompt.seed] for prompt in prompts],
        "held_out_prompts": [[prompt.text, prompt.seed] for prompt in held_out],
        "step_costs": dict(tables.costs),
        "step_caches": {dial.name: list(dial.ends or ()) for dial in tables.dials},
        "step_cache_costs": {name: dict(costs) for name, costs in tables.cache_costs.items()},
        "candidates": [_entry(point) for point in points],
        "held_out_fine_cost": decided.fine.cost,
        "held_out": {kind: _held_out(decided, one) for kind, one in decided.candidates.items()},
        "closer_on": dict(decided.shares),
        "winner": decided.winner,
        "met": decided.met,
        **conditions,
    }
    return Calibration(
        num_inference_steps=tables.steps,
        cost_unit=config.cost_unit,
        target=dict(config.request),
        presets={name: _plan(point, base) for name, point in presets.items()},
        front=tuple(_plan(point, base) for point in front),
        evidence=evidence,
    )


def _plan(point: Point, base: float) -> CalibratedPlan:
    candidate, does = point.candidate, point.candidate.does()
    return CalibratedPlan(
        kind=candidate.kind,
        label=candidate.label,
        policy=does["policy"],
        num_inference_steps=candidate.num_inference_steps,
        cost=point.cost,
        speedup=base / point.cost,
        ssim=point.ssim,
        psnr=point.measurement.mean_psnr,
        step_cache=does.get("step_cache"),
        sigmas=candidate.sigmas,
    )


def _held_out(decided: Confirmation, plan: Point) -> dict[str, Any]:
    return {
        **_entry(plan),
        "speedup": decided.speedup(plan),
        "ssim_per_prompt": list(plan.measurement.similarity),
    }


def _entry(point: Point) -> dict[str, Any]:
    candidate = point.candidate
    named = {"kind": candidate.kind, "label": candidate.label, **candidate.does()}
    return {
        **named,
        "cost": point.cost,
        "ssim": point.ssim,
        "psnr": point.measurement.mean_psnr,
    }
