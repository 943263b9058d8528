"""A calibration from the request to the record: search, confirm, choose the presets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddit_rt.artifact import Calibration
from ddit_rt.lab.calibrate.confirm import SPARE, Confirmation, confirm
from ddit_rt.lab.calibrate.moves import Space
from ddit_rt.lab.calibrate.record import calibration_record
from ddit_rt.lab.calibrate.search import Search
from ddit_rt.lab.measure.measures import Measure
from ddit_rt.lab.plans.bench import Bench
from ddit_rt.lab.plans.candidates import KINDS, full_resolution
from ddit_rt.lab.plans.points import Measurement, Point, Prompt, best_for
from ddit_rt.lab.plans.target import (
    BUDGET_MS,
    GENTLE,
    MIN_SSIM,
    MIN_STFT,
    SPEEDUP,
    STRONG,
    Target,
)

_BOUNDS: Mapping[str, tuple[float, float]] = {
    SPEEDUP: (1, 1e3),
    MIN_SSIM: (0, 1),
    MIN_STFT: (0, 1),
    BUDGET_MS: (0, 1e9),
}
"""What a request may lie between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Settings of a calibration.

    Attributes:
        request: One of `{"speedup": x}`, `{"min_ssim": x}`, of recordings `{"min_stft": x}`, and
            `{"budget_ms": x}`.
        prompts: Texts to draw from.
        calibration_prompts: Number of prompts that the search uses.
        held_out_prompts: Number of others that confirm what it found.
        pictures: What the calibration may generate in all.
        cost_unit: `"ms"` or `"tokens"`.
        seed: Seed of the draw of prompts; the noise of prompt i has seed + i.
    """

    request: Mapping[str, float]
    prompts: Sequence[str]
    calibration_prompts: int = 4
    held_out_prompts: int = 8
    pictures: int = 200
    cost_unit: str = "ms"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the request and the counts, before minutes of work."""
        if len(self.request) != 1 or not set(self.request) <= _BOUNDS.keys():
            known = ", ".join(_BOUNDS)
            raise ValueError(f"got the request {dict(self.request)}; give one of {known}")
        ((name, value),) = self.request.items()
        low, high = _BOUNDS[name]
        if not low < value < high:
            raise ValueError(f"got {name}={value}; it must lie between {low} and {high:g}")
        if name == BUDGET_MS and self.cost_unit != "ms":
            raise ValueError("got budget_ms with a cost in tokens; a budget in ms needs cost ms")
        if min(self.calibration_prompts, self.held_out_prompts, self.pictures) < 1:
            raise ValueError(
                f"got {self.calibration_prompts} calibration prompts, {self.held_out_prompts} "
                f"held-out prompts and {self.pictures} pictures; all must be at least 1"
            )
        distinct, wanted = len(set(self.prompts)), self.calibration_prompts + self.held_out_prompts
        if distinct < wanted:
            raise ValueError(
                f"got {distinct} different prompts; {self.calibration_prompts} to calibrate and "
                f"{self.held_out_prompts} held out need {wanted}: give more, or ask for fewer"
            )

    def check(self, measure: Measure) -> None:
        """Refuses a least similarity of another measure than what is made is compared by.

        Raises:
            ValueError: See above.
        """
        ((name, value),) = self.request.items()
        if name in (MIN_SSIM, MIN_STFT) and name != f"min_{measure.key}":
            raise ValueError(
                f"got {name}={value:g} for a model whose every {measure.makes} is compared by "
                f"{measure.name}; give min_{measure.key}"
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
            ValueError: Full resolution keeps the budget already.
        """
        ((name, value),) = self.request.items()
        if name in (MIN_SSIM, MIN_STFT):
            return Target(min_ssim=value)
        limit = value if name == BUDGET_MS else base_cost / value
        if limit >= base_cost:
            raise ValueError(
                f"got budget_ms={value}; full resolution takes {base_cost:.0f} ms here, which is "
                "within it: there is nothing to calibrate"
            )
        return Target(max_cost=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationResult:
    """What `calibrate` gives.

    Attributes:
        calibration: The record for the artifact.
        confirmation: Held-out figures.
        points: Every plan that was measured on all calibration prompts.
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
        conditions: What the figures hold for: machine, versions, size, guidance; for the record.

    Raises:
        ValueError: Too few pictures, or no plan reaches the target; the message says what is
            needed, or reachable.
    """
    tables = bench.tables
    config.check(tables.measure)
    base = tables.costs["p"] * tables.steps
    target = config.target(base)
    prompts, held_out = config.split()
    search = Search(
        space=Space(
            steps=tables.steps,
            costs=tables.costs,
            taus=tables.taus,
            dials=tables.dials,
            places=tables.places,
        ),
        evaluator=bench,
        prompts=prompts,
        targets=[target, target.shifted(GENTLE, base), target.shifted(STRONG, base)],
        pictures=config.pictures,
        seed=config.seed,
    )
    taken = {
        "tables": tables.runs,
        "references": len(prompts),
        "held_out": len(held_out) * (2 + len(search.kinds)),
    }
    search.pictures -= sum(taken.values())
    if search.pictures < search.least:
        least = sum(taken.values()) + search.least
        raise ValueError(
            f"got {config.pictures} pictures, and to measure every family with "
            f"{len(prompts)} calibration and {len(held_out)} held-out prompts takes {least}: "
            "give more, or ask for fewer prompts"
        )
    count = len(prompts)
    same = Measurement(costs=(base,) * count, similarity=(1.0,) * count, psnr=(None,) * count)
    points = [Point(candidate=full_resolution(tables.steps), measurement=same)]
    points += [point for point in search.run() if point.cost < base]
    best = {
        kind: point
        for kind in KINDS
        if (point := best_for(target, [one for one in points if one.candidate.kind == kind]))
    }
    if not best:
        raise ValueError(_unreachable(config, base, points[1:], tables.measure))
    spare = best_for(target.with_room(), points[1:])
    if spare is not None and spare not in best.values():
        best[SPARE] = spare
    decided = confirm(bench, best, held_out, config.request, target)
    taken |= {"search": search.spent, "held_out": len(held_out) * (1 + len(best))}
    told = {"pictures": {**taken, "total": sum(taken.values())}, "plans_tried": len(search.tried)}
    calibration = calibration_record(
        tables, config, {**told, **conditions}, decided, best[decided.winner], points, target
    )
    return CalibrationResult(calibration=calibration, confirmation=decided, points=points)


def _unreachable(
    config: CalibrationConfig, base: float, points: Sequence[Point], measure: Measure
) -> str:
    ((name, value),) = config.request.items()
    if not points:
        return f"no plan for {name}={value:g}: with these steps no plan is faster than all at p"
    nearest = config.target(base)
    best = min(points, key=nearest.shortfall)
    return (
        f"no plan reaches {name}={value:g}; the nearest is {best.candidate.label}: "
        f"{measure.name} {best.ssim:.4f}, {base / best.cost:.2f}x as fast as full resolution, "
        f"{best.cost:.1f} {config.cost_unit} per {measure.makes}. Ask for less, or for another "
        "number of steps"
    )
