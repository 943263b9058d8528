"""A calibration from the request to the record: search, confirm, choose the presets."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt.artifact import CalibratedPlan, Calibration
from ddit_rt.calibration.bench import Bench
from ddit_rt.calibration.confirm import Confirmation, Finalist, confirm
from ddit_rt.calibration.plans import all_fine, families
from ddit_rt.calibration.points import Measurement, Point, Prompt, best_for, pareto_front
from ddit_rt.calibration.search import search
from ddit_rt.calibration.target import BUDGET_MS, MIN_SSIM, SPEEDUP, Target

_GENTLE, _STRONG = 0.5, 1.5
"""Powers of the target's speed-up at which `quality` and `fast` are searched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Settings of a calibration.

    Attributes:
        request: One of `{"speedup": x}`, `{"min_ssim": x}`, `{"budget_ms": x}`.
        prompts: Texts to draw from.
        calibration_prompts: How many the search uses.
        held_out_prompts: How many others confirm.
        evaluations: Plans per family at most.
        cost_unit: `"ms"` or `"tokens"`.
        seed: Of the draw of prompts; each prompt's noise has `seed` plus its place.
    """

    request: Mapping[str, float]
    prompts: Sequence[str]
    calibration_prompts: int = 6
    held_out_prompts: int = 8
    evaluations: int = 24
    cost_unit: str = "ms"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the request and the counts, before minutes of work."""
        if len(self.request) != 1 or not set(self.request) <= {SPEEDUP, MIN_SSIM, BUDGET_MS}:
            raise ValueError(
                f"got the request {dict(self.request)}; give one of speedup, min_ssim, budget_ms"
            )
        ((name, value),) = self.request.items()
        low, high = {SPEEDUP: (1, 1e3), MIN_SSIM: (0, 1), BUDGET_MS: (0, 1e9)}[name]
        if not low < value < high:
            raise ValueError(f"got {name}={value}; it must lie between {low} and {high:g}")
        if name == BUDGET_MS and self.cost_unit != "ms":
            raise ValueError("got budget_ms with a cost in tokens; a budget in ms needs cost ms")
        if min(self.calibration_prompts, self.held_out_prompts, self.evaluations) < 1:
            raise ValueError(
                f"got {self.calibration_prompts} calibration prompts, {self.held_out_prompts} "
                f"held-out prompts and {self.evaluations} evaluations; all must be at least 1"
            )
        distinct, wanted = len(set(self.prompts)), self.calibration_prompts + self.held_out_prompts
        if distinct < wanted:
            raise ValueError(
                f"got {distinct} different prompts; {self.calibration_prompts} to calibrate and "
                f"{self.held_out_prompts} held out need {wanted}: give more, or ask for fewer"
            )

    def split(self) -> tuple[list[Prompt], list[Prompt]]:
        """Calibration and held-out prompts, drawn by the seed without overlap."""
        texts = list(dict.fromkeys(self.prompts))
        random.Random(self.seed).shuffle(texts)  # noqa: S311 - no secret
        wanted = self.calibration_prompts + self.held_out_prompts
        drawn = [Prompt(text=t, seed=self.seed + i) for i, t in enumerate(texts[:wanted])]
        return drawn[: self.calibration_prompts], drawn[self.calibration_prompts :]

    def target(self, base_cost: float) -> Target:
        """The request as a limit.

        Raises:
            ValueError: All-fine keeps the budget already.
        """
        ((name, value),) = self.request.items()
        if name == MIN_SSIM:
            return Target(min_ssim=value)
        limit = value if name == BUDGET_MS else base_cost / value
        if limit >= base_cost:
            raise ValueError(
                f"got budget_ms={value}; all fine steps take {base_cost:.0f} ms here, which is "
                "within it: there is nothing to calibrate"
            )
        return Target(max_cost=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationResult:
    """What `calibrate` gives.

    Attributes:
        calibration: The record for the artifact.
        confirmation: Held-out figures.
        points: Every plan that was measured.
    """

    calibration: Calibration
    confirmation: Confirmation
    points: Sequence[Point]


def calibrate(
    bench: Bench, config: CalibrationConfig, conditions: Mapping[str, Any]
) -> CalibrationResult:
    """Searches, confirms on held-out prompts, and picks the presets.

    Args:
        bench: Runs plans.
        config: Settings.
        conditions: What the figures hold for: machine, versions, picture size; for the record.

    Raises:
        ValueError: No plan reaches the target; the message says what is reachable.
    """
    base = bench.costs["p"] * bench.steps
    target = config.target(base)
    prompts, held_out = config.split()
    coarse = tuple(size for size in bench.costs if size != "p")
    found = search(
        families(bench.steps, coarse, bench.taus),
        bench,
        prompts,
        costs=bench.costs,
        targets=[target, target.shifted(_GENTLE, base), target.shifted(_STRONG, base)],
        evaluations=config.evaluations,
    )
    cheaper = {kind: [p for p in f.points if p.cost < base] for kind, f in found.items()}
    finalists = {
        kind: best
        for kind, points in cheaper.items()
        if (best := best_for(target, points)) is not None
    }
    if not finalists:
        raise ValueError(_unreachable(config, base, [p for row in cheaper.values() for p in row]))
    decided = confirm(bench, found, finalists, held_out, config.request, target)
    points = [_fine_point(bench.steps, base, len(prompts))]
    points += [point for row in cheaper.values() for point in row]
    calibration = _record(
        bench, config, conditions, decided, finalists[decided.winner], points, target
    )
    return CalibrationResult(calibration=calibration, confirmation=decided, points=points)


def _fine_point(steps: int, base: float, prompts: int) -> Point:
    same = Measurement(cost=base, similarity=(1.0,) * prompts, psnr=(None,) * prompts)
    return Point(candidate=all_fine(steps), measurement=same)


def _unreachable(config: CalibrationConfig, base: float, points: Sequence[Point]) -> str:
    ((name, value),) = config.request.items()
    if not points:
        return f"no plan for {name}={value:g}: with these steps nothing is faster than all fine"
    nearest = config.target(base)
    best = min(points, key=nearest.shortfall)
    return (
        f"no plan reaches {name}={value:g}; the nearest is {best.candidate.label}: SSIM "
        f"{best.ssim:.4f}, {base / best.cost:.2f}x as fast as all fine, {best.cost:.1f} "
        f"{config.cost_unit} a picture. Ask for less, or for another number of steps"
    )


def _record(
    bench: Bench,
    config: CalibrationConfig,
    conditions: Mapping[str, Any],
    decided: Confirmation,
    winner: Point,
    points: Sequence[Point],
    target: Target,
) -> Calibration:
    base = points[0].cost
    # A plan that looked better than the winner until the held-out prompts is no part of the front.
    front = pareto_front([point for point in points if not point.dominates(winner)])
    presets = {
        "quality": _quality(front, winner, target.shifted(_GENTLE, base)),
        "balanced": winner,
        "fast": _fast(front, winner, target.shifted(_STRONG, base)),
    }
    prompts, held_out = config.split()
    evidence = {
        "verdict": decided.verdict,
        "seed": config.seed,
        "prompts": [[prompt.text, prompt.seed] for prompt in prompts],
        "held_out_prompts": [[prompt.text, prompt.seed] for prompt in held_out],
        "step_costs": dict(bench.costs),
        "candidates": [_candidate(point) for point in points],
        "held_out_fine_cost": decided.fine.cost,
        "held_out": {kind: _held_out(decided, plan) for kind, plan in decided.finalists.items()},
        "at_equal_cost": {kind: _held_out(decided, plan) for kind, plan in decided.equals.items()},
        "dynamic_is_closer_on": dict(decided.shares),
        "static_at_the_winners_cost": decided.static and _held_out(decided, decided.static),
        "winner_is_closer_than_static_on": decided.over_static,
        "winner": decided.winner,
        "met": decided.met,
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
        # As JSON gives it back: a record equals itself after loading.
        policy=json.loads(json.dumps(candidate.policy.to_dict())),
        num_inference_steps=candidate.num_inference_steps,
        cost=point.cost,
        speedup=base / point.cost,
        ssim=point.ssim,
        psnr=point.measurement.mean_psnr,
    )


def _candidate(point: Point) -> dict[str, Any]:
    return {
        "kind": point.candidate.kind,
        "label": point.candidate.label,
        "num_inference_steps": point.candidate.num_inference_steps,
        "cost": point.cost,
        "ssim": point.ssim,
        "psnr": point.measurement.mean_psnr,
    }


def _held_out(decided: Confirmation, plan: Finalist) -> dict[str, Any]:
    return {
        "label": plan.candidate.label,
        "cost": plan.result.cost,
        "speedup": decided.speedup(plan),
        "ssim": plan.result.ssim,
        "psnr": plan.result.mean_psnr,
        "ssim_per_prompt": list(plan.result.similarity),
    }
