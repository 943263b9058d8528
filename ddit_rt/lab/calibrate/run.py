"""A calibration from the request to the record: search, confirm, choose the presets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddit_rt.artifact import Calibration
from ddit_rt.lab.calibrate.confirm import Confirmation, confirm
from ddit_rt.lab.calibrate.record import calibration_record
from ddit_rt.lab.calibrate.search import search
from ddit_rt.lab.calibrate.spaces import COMBINED as WITH_CACHE
from ddit_rt.lab.calibrate.spaces import Space, spaces
from ddit_rt.lab.measure.measures import Measure
from ddit_rt.lab.plans.bench import Bench
from ddit_rt.lab.plans.candidates import (
    CACHED,
    COMBINED,
    DYNAMIC,
    Dynamic,
    ThresholdCache,
    full_resolution,
)
from ddit_rt.lab.plans.points import Found, Measurement, Point, Prompt, best_for
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
        evaluations: Plans of each kind that are tried, at most.
        cost_unit: `"ms"` or `"tokens"`.
        seed: Seed of the draw of prompts; the noise of prompt i has seed + i.
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
        if len(self.request) != 1 or not set(self.request) <= _BOUNDS.keys():
            known = ", ".join(_BOUNDS)
            raise ValueError(f"got the request {dict(self.request)}; give one of {known}")
        ((name, value),) = self.request.items()
        low, high = _BOUNDS[name]
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
        conditions: What the figures hold for: machine, versions, size, guidance; for the record.

    Raises:
        ValueError: No plan reaches the target; the message says what is reachable.
    """
    config.check(bench.measure)
    base = bench.costs["p"] * bench.steps
    target = config.target(base)
    prompts, held_out = config.split()
    coarse = tuple(size for size in bench.costs if size != "p")
    gentle, strong = target.shifted(GENTLE, base), target.shifted(STRONG, base)

    def searched(what: Sequence[Space]) -> dict[str, Found]:
        return search(
            what,
            bench,
            prompts,
            costs=bench.costs,
            targets=[target, gentle, strong],
            evaluations=config.evaluations,
        )

    found = searched(spaces(bench.steps, coarse, bench.taus, bench.caches))
    found |= searched(_combined(found, gentle, base))
    cheaper = {kind: [p for p in f.points if p.cost < base] for kind, f in found.items()}
    best = {
        kind: point
        for kind, points in cheaper.items()
        if (point := best_for(target, points)) is not None
    }
    if not best:
        tried = [point for row in cheaper.values() for point in row]
        raise ValueError(_unreachable(config, base, tried, bench.measure))
    decided = confirm(bench, found, best, held_out, config.request, target)
    points = [_reference_point(bench.steps, base, len(prompts))]
    points += [point for row in cheaper.values() for point in row]
    calibration = calibration_record(
        bench, config, conditions, decided, best[decided.winner], points, target
    )
    return CalibrationResult(calibration=calibration, confirmation=decided, points=points)


def _combined(found: Mapping[str, Found], gentle: Target, base: float) -> list[Space]:
    """The best dynamic plan with the step cache that alone would give the gentler target."""
    if DYNAMIC not in found or CACHED not in found:
        return []
    faster = [point for point in found[CACHED].points if point.cost < base]
    if not faster:
        return []
    point = best_for(gentle, faster) or min(faster, key=gentle.shortfall)
    cache, dynamic = point.candidate.step_cache, found[DYNAMIC]
    assert isinstance(cache, ThresholdCache)
    assert isinstance(dynamic.template, Dynamic)
    start = replace(dynamic.template, cache=cache)
    return [Space(kind=COMBINED, start=start, variations=WITH_CACHE, level=dynamic.level)]


def _reference_point(steps: int, base: float, prompts: int) -> Point:
    same = Measurement(cost=base, similarity=(1.0,) * prompts, psnr=(None,) * prompts)
    return Point(candidate=full_resolution(steps), measurement=same)


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


def most_runs(config: CalibrationConfig, *, sizes: int, caches: int, repeats: int) -> int:
    """Generations that a calibration takes at most.

    Args:
        config: Settings of the search.
        sizes: Number of patch sizes of the artifact.
        caches: Number of step caches that the model has a fit for.
        repeats: Rounds of `EngineBench.confirm`.
    """
    rounds = repeats if config.cost_unit == "ms" else 1
    kinds, adaptive = (5, 3) if caches else (3, 1)
    probes = (1 + caches) * 2 * sizes + 2 + caches
    search = config.calibration_prompts * (1 + kinds * config.evaluations)
    # The best plan of each kind; two baselines at equal cost for each adaptive one; a static plan
    # at the cost of fewer steps. Each time beside full resolution, and warmed up.
    confirm = (1 + kinds + 1 + 2 * adaptive + 1 + 1) * (1 + rounds * config.held_out_prompts)
    return probes + search + confirm
